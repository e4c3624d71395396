#!/usr/bin/env python3
r"""Tokenise raw text into ``{output-prefix}_{key}_document.{bin,idx}`` and a sidecar.

    python tools/preprocess_data.py --input corpus.jsonl.zst --tokenizer-type HFTokenizer \
        --vocab-file tokenizer.json --append-eod --output-prefix data/code --workers 8

Flags are GPT-NeoX's.  An interrupted run is continued by the same command; a finished one is
left alone unless --overwrite is given.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.ingest.pipeline import preprocess
from megatron.data.ingest.settings import Outcome, PreprocessSettings
from megatron.data.shards import parse_shard
from megatron.data.sidecar import read_sidecar
from megatron.errors import run_command
from megatron.tokenizer import TOKENIZER_TYPES

EXIT_TERMINATED = 143


def parse_arguments(arguments: Sequence[str] | None = None) -> PreprocessSettings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input", required=True, nargs="+", action="extend", metavar="PATH",
        help="files, folders, globs or comma lists of them: JSON lines, plain text (each also "
        ".gz, .zst, .xz, .bz2), Parquet, a folder saved by Hugging Face datasets; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--jsonl-keys", nargs="+", default=["text"], metavar="KEY",
        help="fields (or columns) to tokenise, each into a dataset of its own (default: text)",
    )  # fmt: skip
    group.add_argument(
        "--num-docs", type=int, metavar="N",
        help="number of documents in the input, if known, for the progress; limits nothing",
    )  # fmt: skip
    group.add_argument(
        "--text-documents", choices=("file", "line"), default="file",
        help="what is a document in a plain-text file (default: the file)",
    )  # fmt: skip
    group.add_argument(
        "--bad-records", choices=("stop", "skip"), default="stop",
        help="at a line that is no JSON, lacks a key or is not UTF-8: stop with its number "
        "(default), or leave it out and count it",
    )  # fmt: skip
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type", required=True, metavar="TYPE",
        help=f"one of {', '.join(TOKENIZER_TYPES)}",
    )  # fmt: skip
    group.add_argument(
        "--vocab-file", metavar="FILE",
        help="tokenizer.json, vocab.json, sentencepiece model, or tiktoken file or encoding name",
    )  # fmt: skip
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT2BPETokenizer")
    group.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    group.add_argument("--ftfy", action="store_true", help="repair the text with ftfy first")
    group.add_argument(
        "--encoder", choices=("auto", "tokenizers"), default="auto",
        help="auto (default) encodes a byte-level BPE by a faster way once that is verified to "
        "give the same ids; tokenizers never does",
    )  # fmt: skip
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="without suffix")
    group.add_argument(
        "--dataset-impl", choices=("mmap",), default="mmap", help="the only format: MMIDIDX"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start again, over whatever the prefix holds"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--shard", metavar="I/N",
        help="do part I (from 0) of N of the inputs, into PREFIX-0000I-of-0000N…; slurm: this task "
        "of a job array. tools/merge_datasets.py --shards PREFIX joins them into what one run "
        "writes",
    )  # fmt: skip
    group.add_argument("--workers", type=int, default=1, help="processes that encode (default: 1)")
    group.add_argument(
        "--log-interval", type=int, default=100, metavar="N",
        help="documents between two progress reports, at least (default: 100)",
    )  # fmt: skip
    group.add_argument(
        "--save-seconds", type=float, default=10.0, metavar="SECONDS",
        help="time between two points from which an interrupted run can go on (default: 10)",
    )  # fmt: skip
    found = parser.parse_args(arguments)
    if found.workers < 1:
        parser.error(f"--workers {found.workers}: at least 1")
    return PreprocessSettings(
        inputs=tuple(found.input),
        output_prefix=found.output_prefix,
        tokenizer_type=found.tokenizer_type,
        vocab_file=found.vocab_file,
        merge_file=found.merge_file,
        keys=tuple(found.jsonl_keys),
        append_eod=found.append_eod,
        ftfy=found.ftfy,
        workers=found.workers,
        text_documents=found.text_documents,
        bad_records=found.bad_records,
        overwrite=found.overwrite,
        fast=found.encoder == "auto",
        save_seconds=found.save_seconds,
        num_documents=found.num_docs,
        log_interval=found.log_interval,
        shard=parse_shard(found.shard),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    settings = parse_arguments(arguments)
    # One worker is one core; more cores are asked for by --workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        outcome = preprocess(settings, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for line in summary(outcome):
        print(line)
    return 0


def summary(outcome: Outcome) -> list[str]:
    """Return what was written, as lines."""
    lines = []
    for key, prefix in outcome.prefixes.items():
        progress = outcome.journal.keys[key]
        sidecar = read_sidecar(prefix)
        ratio = (
            f", {sidecar.bytes_per_token:.2f} bytes a token" if sidecar and sidecar.tokens else ""
        )
        empty = f", {progress.empty:,} empty left out" if progress.empty else ""
        lines.append(
            f"{prefix}.bin: {progress.documents:,} documents, {progress.tokens:,} tokens"
            f"{ratio}{empty}"
        )
    if outcome.journal.bad:
        lines.append(f"{outcome.journal.bad:,} unusable records left out")
    if outcome.already_done:
        lines.append("already complete: nothing to do (--overwrite makes it again)")
    elif outcome.seconds > 0:
        speed = outcome.text_bytes / 1e6 / outcome.seconds
        lines.append(f"{outcome.seconds:.1f} s, {speed:.1f} MB/s of text")
    return lines


def _terminate(*_: object) -> None:
    print("terminated; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    sys.exit(run_command(main))
