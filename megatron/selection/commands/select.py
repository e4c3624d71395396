r"""Keep the documents that a table of scores and a budget choose, as text and ready to train on.

    tools/select_data.py select --scores scores/bm25.parquet --share 0.05 --out chosen \
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json

Written are OUT/NAME.jsonl (the records as they were, with id and score, in the order of the choice)
and, with a tokenizer or from tokenised data, a domain of .bin/.idx and OUT/NAME.yml, a
configuration fragment with it.  NAME is TASK-train-pSHARE-METHOD unless --name says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron.errors import ConfigError, DataError
from megatron.selection.bill import Bill
from megatron.selection.choose import Limit, Places, Ranking, choose, share_of
from megatron.selection.commands.select_flags import (
    add_budget_arguments,
    add_output_arguments,
    add_ranking_arguments,
)
from megatron.selection.commands.shared import (
    add_config_arguments,
    add_tokenizer_arguments,
    inputs_of,
    parser_of,
    read_configuration,
    tokenizer_choice,
)
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.cost_model import Model, known_model, read_number, sized_model
from megatron.selection.domain_output import TokenizerChoice
from megatron.selection.flags import refuse_idle
from megatron.selection.inputs import open_corpus
from megatron.selection.names import Naming, domain_name, output_name, task_name
from megatron.selection.outputs import OutputRequest, Outputs, write_outputs
from megatron.selection.progress import Progress
from megatron.selection.table import ScoreTable, TableFacts
from megatron.selection.work import work_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megatron.config import Config

_BATCH = 1024


def make_parser(prog: str, words: list[str]) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = parser_of(prog, __doc__)
    parser.add_argument(
        "--scores", required=True, metavar="FILE.parquet", help="the table of the scoring"
    )
    add_budget_arguments(parser)
    add_ranking_arguments(parser)
    add_output_arguments(parser)
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--train", nargs="+", action="extend", metavar="PATH",
        help="where the documents are now, if not where they were when they were scored",
    )  # fmt: skip
    add_config_arguments(parser, "the model for --flops, domains for --train, and the tokenizer")
    add_tokenizer_arguments(parser, "Makes the domain; counts tokens where the scoring did not.")
    return parser


def run(options: argparse.Namespace) -> int:
    """Choose, write, and say what came of it."""
    config = read_configuration(options)
    choice = tokenizer_choice(options, config)
    table = ScoreTable(options.scores)
    try:
        facts = table.facts
        _check_flags(options, facts)
        ranking = _ranking(options)
        columns = table.columns("score", "tokens", "source")
    finally:
        table.close()
    scores, tokens = columns["score"], columns["tokens"]
    bill = _bill(options, config, facts)
    corpus = _open(options, config, choice, facts)
    try:
        if _counted_otherwise(choice, facts):
            tokens = np.full_like(tokens, -1)
        if (options.tokens is not None or bill is not None) and (tokens < 0).any():
            tokens = _count(corpus, choice)
        limit = _limit(options, bill, len(scores))
        chosen = choose(scores, ranking, limit, tokens=tokens, sources=columns["source"])
        about = _about(facts, ranking, chosen, tokens)
        print(about)
        if bill is not None:
            print("\n".join(bill.lines(int(tokens[chosen].sum()))))
        if options.dry_run:
            return 0
        request = _outputs(options, choice, facts, ranking, chosen, about)
        done = write_outputs(corpus, chosen, scores, request, _say)
    finally:
        corpus.close()
    print("\n".join(_done_lines(done)))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _check_flags(options: argparse.Namespace, facts: TableFacts) -> None:
    """Refuse flags that would change nothing."""
    parser = make_parser("select", [])
    if options.order != "sample":
        refuse_idle(options, parser, ["temperature"], "--order sample")
    if options.order not in ("low", "mid"):
        refuse_idle(options, parser, ["thirds-of"], "--order low and mid")
    if facts.method != "ppl":
        refuse_idle(options, parser, ["epoch"], "the names of choices by ppl")
    if options.flops is None:
        refuse_idle(options, parser, ["model-size", "epochs"], "--flops")


def _ranking(options: argparse.Namespace) -> Ranking:
    return Ranking(
        order=options.order,
        seed=options.seed,
        temperature=options.temperature,
        thirds_of=options.thirds_of,
        per_source=options.per_source,
    )


def _bill(options: argparse.Namespace, config: Config | None, facts: TableFacts) -> Bill | None:
    if options.flops is None:
        return None
    budget = read_number(options.flops, "--flops")
    return Bill(
        flops=budget, scoring=facts.cost, model=_model(options, config), epochs=options.epochs
    )


def _model(options: argparse.Namespace, config: Config | None) -> Model:
    if options.model_size is not None:
        return sized_model(options.model_size)
    if config is None:
        raise ConfigError(
            "--flops: say what will be trained: its configuration by --config, or --model-size 7B"
        )
    from megatron.training.plan.command import with_vocabulary

    return known_model(with_vocabulary(config).model, Path(options.config[-1]).stem)


def _limit(options: argparse.Namespace, bill: Bill | None, documents: int) -> Limit:
    if bill is not None:
        return Limit(tokens=bill.tokens)
    if options.tokens is not None:
        return Limit(tokens=read_number(options.tokens, "--tokens"))
    if options.share is not None:
        return Limit(documents=share_of(documents, options.share))
    return Limit(documents=options.documents)


def _open(
    options: argparse.Namespace, config: Config | None, choice: TokenizerChoice, facts: TableFacts
) -> DocumentCorpus:
    """Open the corpus that was scored.

    Raises:
        DataError: it is not where it was, or not what it was.
    """
    options.field = facts.inputs["field"]
    options.text_documents = facts.inputs["text_documents"]
    words = options.train or list(facts.inputs["words"])
    work = work_folder(Path(options.scores))
    try:
        corpus = open_corpus(
            inputs_of(options, config, words),
            tokenizer=choice.tokenizer(),
            folder=work.index if work.path.exists() else None,
        )
    except DataError as error:
        if options.train:
            raise
        where = " (domains of a configuration: name it by --config)" if config is None else ""
        raise DataError(
            f"{error}; the documents were scored there; if they are elsewhere now, say where with "
            f"--train{where}"
        ) from None
    if corpus.fingerprint() != facts.data:
        corpus.close()
        raise DataError(f"--train {' '.join(words)}: {_what_differs(corpus, facts)}")
    return corpus


def _what_differs(corpus: DocumentCorpus, facts: TableFacts) -> str:
    then = {str(part["name"]): part for part in facts.parts}
    now = {part.name: part for part in corpus.facts()}
    for name, part in now.items():
        if name not in then:
            return f"'{name}' was not scored; name what was, or score again"
        if part.as_json() != then[name]:
            return (
                f"'{name}' has changed since it was scored (it had {then[name]['documents']:,} "
                f"documents, and has {part.documents:,}); score it again"
            )
    missing = [name for name in then if name not in now]
    if missing:
        return f"'{missing[0]}' was scored too; name it as well"
    return "the documents stand in another order than when they were scored"


def _counted_otherwise(choice: TokenizerChoice, facts: TableFacts) -> bool:
    """Tell whether the table's counts are not those of the tokenizer that is named now."""
    encoder = choice.encoder()
    return encoder is not None and dict(encoder.identity()) != facts.tokenizer


def _count(corpus: DocumentCorpus, choice: TokenizerChoice) -> NDArray[np.int64]:
    """Count every document's tokens.

    Raises:
        ConfigError: there is nothing to count with.
    """
    encoder = choice.encoder()
    if encoder is None:
        raise ConfigError(
            "--tokens and --flops need each document's tokens, and the scoring counted none; give "
            "--tokenizer-type and --vocab-file (to score as well, next time)"
        )
    progress = Progress(total=len(corpus), done=0, what="counted")
    counts = np.zeros(len(corpus), dtype=np.int64)
    for start in range(0, len(corpus), _BATCH):
        batch = list(corpus.read(start, min(start + _BATCH, len(corpus))))
        counts[start : start + len(batch)] = encoder.count(batch)
        progress.add(len(batch))
    progress.close()
    return counts


def _about(facts: TableFacts, ranking: Ranking, chosen: Places, tokens: NDArray[np.int64]) -> str:
    own = tokens[chosen]
    counted = "" if (own < 0).any() else f", {int(own.sum()):,} tokens"
    task = f" for {facts.task}" if facts.task else ""
    return (
        f"{len(chosen):,} of {facts.documents:,} documents by {facts.method}{task}, order "
        f"{ranking.order}{counted}"
    )


def _outputs(
    options: argparse.Namespace,
    choice: TokenizerChoice,
    facts: TableFacts,
    ranking: Ranking,
    chosen: Places,
    about: str,
) -> OutputRequest:
    task = options.task if options.task is not None else facts.task
    share = options.share if options.share is not None else len(chosen) / facts.documents
    naming = Naming(
        task=task,
        method=facts.method,
        parameters=facts.parameters,
        ranking=ranking,
        share=share,
        epoch=options.epoch,
    )
    named = {
        "tokenizer_type": choice.kind,
        "vocab_file": choice.vocab_file,
        "merge_file": choice.merge_file,
    }
    keys = {key: value for key, value in named.items() if value is not None}
    digest = hashlib.sha256(np.ascontiguousarray(chosen, dtype="<i8").tobytes())
    encoder = choice.encoder()
    domain = options.domain or domain_name(task, facts.method)
    return OutputRequest(
        folder=Path(options.out),
        name=task_name(options.name) if options.name else output_name(naming),
        settings={
            "method": facts.method,
            "parameters": dict(facts.parameters),
            "data": facts.data,
            "targets": dict(facts.targets),
            "documents": len(chosen),
            "chosen": digest.hexdigest(),
            "order": ranking.order,
            "seed": ranking.seed,
            "tokenizer": None if encoder is None else dict(encoder.identity()),
            "domain": domain,
        },
        field=facts.inputs["field"],
        domain=domain,
        about=about,
        choice=choice,
        config_keys=keys,
        workers=options.workers,
        overwrite=options.overwrite,
        scoring={
            "documents": facts.documents,
            "flops": facts.cost.flops,
            "tokens": facts.cost.tokens,
        },
    )


def _done_lines(done: Outputs) -> list[str]:
    lines = [f"{done.records}"]
    if done.domain is not None:
        trained = ""
        if done.domain.labels is not None:
            trained = f", {done.domain.trained:,} of them trained on"
        lines.append(
            f"{done.domain.prefix}.bin: {done.domain.documents:,} documents, "
            f"{done.domain.tokens:,} tokens{trained}"
        )
        lines.append(f"train on it with: ./deepy.py train.py MODEL.yml {done.fragment}")
    else:
        lines.append("no tokenizer is named, so no domain is made (--tokenizer-type, --config)")
    if done.already_done:
        lines.append("already complete: nothing to do (--overwrite makes it again)")
    return lines
