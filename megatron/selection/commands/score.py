r"""Score every document of a corpus, against targets where the method compares: a Parquet table.

    tools/select_data.py score --method bm25 --train corpus.jsonl.gz more/ \
        --target mmlu=mmlu.jsonl --out scores/bm25.parquet

Killed, it goes on when the same command is given again.  Shared out (--shard 0/8 … 7/8, or --shard
slurm in a job array) over processes that see one file system, and joined by the subcommand merge.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import ConfigError
from megatron.selection.commands.shared import (
    add_config_arguments,
    add_field_argument,
    add_text_documents_argument,
    add_tokenizer_arguments,
    inputs_of,
    parser_of,
    read_configuration,
    tokenizer_choice,
)
from megatron.selection.flags import positive
from megatron.selection.methods import METHODS, chunk_documents, load_method

if TYPE_CHECKING:
    from megatron.selection.table import TableFacts


def make_parser(prog: str, words: list[str]) -> argparse.ArgumentParser:
    """Return the parser, with the flags of the method that the words name, or of all for a help.

    Raises:
        ConfigError: there is no method of that name.
    """
    parser = parser_of(prog, __doc__)
    _add_common(parser)
    named = _named_method(words)
    if named is None:
        parser.epilog = "\n\n".join(_method_help(name) for name in METHODS)
        return parser
    method = load_method(named)
    own = parser._optionals
    own.title, own.description = f"--method {named}", (method.__doc__ or "").partition("\n\n")[0]
    method.add_arguments(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Score, and say what was done."""
    from megatron.data.shards import parse_shard
    from megatron.selection.driver import score
    from megatron.selection.settings import ScoreRequest
    from megatron.selection.targets import open_targets

    out = Path(options.out)
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: a Parquet file; give it the ending .parquet")
    shard = parse_shard(options.shard)
    config = read_configuration(options)
    choice = tokenizer_choice(options, config)
    selector = load_method(options.method).from_options(options)
    tokenizer = choice.tokenizer()
    targets = None
    if options.target:
        targets = open_targets(options.target, field=options.field, tokenizer=tokenizer)
        if not selector.needs_targets:
            print(f"{options.method} reads no targets: --target only names the task")
    request = ScoreRequest(
        selector=selector,
        inputs=inputs_of(options, config, options.train),
        targets=targets,
        out=out,
        tokenizer=tokenizer,
        encoder=choice.encoder(),
        shard=shard,
        chunk_documents=options.chunk_documents or chunk_documents(options.method),
        overwrite=options.overwrite,
        work=None if options.work_dir is None else Path(options.work_dir),
    )
    if options.shard is None and int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) > 1:
        print("one task of a job array scores all of it; --shard slurm shares it out", flush=True)
    done = score(request, lambda line: print(line, flush=True))
    if done.table is None:
        what = "all shards are done" if not done.left else f"{done.left} chunks of others are left"
        print(f"shard {shard}: {done.scored:,} documents scored; {what}; join them with:")
        print(f"  tools/select_data.py merge --out {out}")
        return 0
    if not done.scored and not options.overwrite:
        print(f"{out}: already complete: nothing to do (--overwrite makes it again)")
    print(summary(out, done.table))
    return 0


def summary(out: Path, facts: TableFacts) -> str:
    """Return what a table holds, as a line."""
    count = len(facts.subtasks)
    several = f"{count} subtask{'s' * (count > 1)} of {facts.task}"
    against = f" against {several}" if count else ""
    cost = f", {facts.cost.flops:.4g} FLOPs" if facts.cost.flops else ""
    return f"{out}: {facts.documents:,} documents by {facts.method}{against}{cost}"


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--method", required=True, metavar="METHOD",
        help=f"one of {', '.join(METHODS)}; each has flags of its own",
    )  # fmt: skip
    group.add_argument(
        "--train", required=True, nargs="+", action="extend", metavar="PATH",
        help="what to choose from: JSON lines, plain text (each also .gz, .zst, .xz, .bz2), "
        "Parquet, folders, globs, folders saved by Hugging Face datasets; tokenised data by "
        "their prefix, or by the name of a domain of --config",
    )  # fmt: skip
    group.add_argument(
        "--target", nargs="+", action="extend", default=[], metavar="[NAME=]PATH",
        help="what shall be learned: files of examples, in the same formats; a folder is a task "
        "with a subtask for each file, and records may name theirs by subtask or task",
    )  # fmt: skip
    add_field_argument(group)
    add_text_documents_argument(group)
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="FILE.parquet", help="the table of scores")
    group.add_argument(
        "--overwrite", action="store_true", help="start again, over whatever is there"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--shard", metavar="I/N",
        help="score one of N contiguous parts, I from 0 to N - 1; slurm: this task's of a job "
        "array.  All write into one work folder",
    )  # fmt: skip
    group.add_argument(
        "--work-dir", metavar="DIR", help="folder of work (default: OUT.work, beside the table)"
    )
    group.add_argument(
        "--chunk-documents", type=positive, metavar="N",
        help="documents scored between two points from which a killed run goes on (default: "
        + ", ".join(f"{chunk_documents(name):,} by {name}" for name in METHODS) + ")",
    )  # fmt: skip
    add_config_arguments(parser, "domains for --train, and the tokenizer")
    add_tokenizer_arguments(
        parser,
        "Counts each document's tokens, which a choice by tokens or FLOPs needs, and reads "
        "tokenised data as text.",
    )


def _named_method(words: list[str]) -> str | None:
    """Return the method that the words name, before they can be parsed."""
    for place, word in enumerate(words):
        if word == "--method" and place + 1 < len(words):
            return words[place + 1]
        if word.startswith("--method="):
            return word.partition("=")[2]
    return None


def _method_help(name: str) -> str:
    method = load_method(name)
    own = argparse.ArgumentParser(prog="", usage="", add_help=False, allow_abbrev=False)
    method.add_arguments(own)
    flags = own.format_help().partition("\n\n")[2] if own._actions else ""
    about = (method.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return f"--method {name}: {about}\n{flags}".rstrip()
