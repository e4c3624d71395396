r"""Spend one budget on choosing, mixing and training: the best of all combinations, by the laws.

  tools/mix.py budget base.yml --flops 1e18 --gains plans/own --models 70m.yml 160m.yml \
      --league runs/studies/bench --selector ppl=70M --target exam=exam.jsonl \
      --scorer ppl=runs/small

Every selector of --gains (from tools/select_data.py fit), share of the corpus, way of mixing (the
methods of a finished comparison, the best mixture of a law, the configuration's own) and model is
tried under one cap on FLOPs.  What choosing and mixing cost is paid from it.  The ranking says how
sure it is, what was measured, and what is extrapolated.

In --out: budget.json, budget.md, and for the best rows run-N.yml with run-N.sh, the commands that
choose the documents and then train.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron.checkpoint.files import write_text
from megatron.errors import ConfigError, did_you_mean
from megatron.experiments.budget_configs import (
    SCORED_BY_MODELS,
    Choosing,
    Proposal,
    proposals_text,
    write_proposal,
)
from megatron.experiments.budget_mixing import (
    MixingOption,
    base_option,
    law_option,
    league_options,
)
from megatron.experiments.budget_search import REPEATS, SHARES, Aim, Candidate, search
from megatron.experiments.budget_text import budget_facts, budget_text
from megatron.experiments.conduct import add_set_argument
from megatron.experiments.study import Base
from megatron.launch.devices import detect_devices
from megatron.selection.commands.planning import add_price_arguments, asked_prices, write_json
from megatron.selection.cost_model import Model, known_model, read_number
from megatron.selection.gains import Gains, methods_of, read_gains
from megatron.training.domains import open_run_domains, start_weights
from megatron.training.summary import complete


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument(
        "conf_file", nargs="*", metavar="CONFIG", help="what all runs begin with: data, training"
    )
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of those files")
    add_set_argument(parser)
    parser.add_argument(
        "--flops", required=True, metavar="N", help="the cap: choosing, mixing and training"
    )
    parser.add_argument(
        "--gains", required=True, type=Path, metavar="DIR", help="--out of select_data.py fit"
    )
    parser.add_argument("--task", metavar="NAME", help="of the gains (default: their only one)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/studies/budget"), metavar="DIR", help="results"
    )
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="rows to write runs of (default: 3)"
    )
    group = parser.add_argument_group("what is tried")
    group.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="CONFIG",
        help="models, each over the configuration (default: its own)",
    )
    group.add_argument(
        "--selectors", nargs="+", metavar="METHOD", help="of the gains (default: all)"
    )
    group.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=list(SHARES),
        metavar="S",
        help="parts of the corpus to choose, beside what the cap pays for in one pass",
    )
    group.add_argument(
        "--max-epochs",
        type=float,
        default=4.0,
        metavar="E",
        help="most passes over what is chosen (default: 4); repeats lose their worth with "
        f"R* = {REPEATS} passes (arXiv 2305.16264)",
    )
    mixing = parser.add_argument_group("ways of mixing, beside the configuration's own")
    mixing.add_argument("--league", type=Path, metavar="DIR", help="--out of mix.py compare")
    mixing.add_argument("--league-task", metavar="NAME", help="of it (default: its only one)")
    mixing.add_argument("--methods", nargs="+", metavar="NAME", help="of it (default: all)")
    mixing.add_argument("--law", type=Path, metavar="DIR", help="--out of mix.py fit-law")
    mixing.add_argument(
        "--per-nat",
        type=float,
        metavar="P",
        help="performance that a nat of held-out loss is worth, where gains are no losses",
    )
    add_price_arguments(parser)
    words = parser.add_argument_group("for the commands of the runs")
    words.add_argument(
        "--target",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]FILE",
        help="examples of what shall be learned",
    )
    words.add_argument(
        "--scorer",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD=MODEL",
        help="what scores: the --model of select_data.py score, for ppl, embed and less",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")


def run(options: argparse.Namespace) -> int:
    """Search, print the ranking and write the runs; return the exit code."""
    if not options.conf_file:
        raise ConfigError("no configuration was given; name what all runs begin with")
    gains = asked_gains(options)
    aim = asked_aim(options, gains)
    bases = asked_bases(options)
    models, corpus, weights = open_models(bases)
    options.corpus_tokens = options.corpus_tokens or repr(corpus)
    prices = asked_prices(options)
    mixing, left_out = asked_mixing(options, gains, weights)
    found = search(gains, models, mixing, prices, aim)
    text = budget_text(gains, aim, found, mixing, left_out)
    proposals, unwritten = write_runs(options, bases, models, found)
    text += proposals_text(proposals) + "".join(f"- Not written: {line}\n" for line in unwritten)
    path = write_text(options.out / "budget.md", text)
    facts = budget_facts(gains, aim, found, mixing, left_out)
    facts["runs"] = [
        {"config": str(one.config), "script": str(one.script), "steps": one.steps}
        for one in proposals
    ]
    print(text, end="")
    print(f"written: {path} {write_json(facts, options.out / 'budget.json')}")
    return 0


def asked_gains(options: argparse.Namespace) -> Gains:
    """Return the laws of the selectors that are tried."""
    gains = read_gains(options.gains)
    if options.selectors is None:
        return gains
    known = methods_of(gains.gains)
    for name in options.selectors:
        if name not in known:
            raise ConfigError(f"--selectors {name}: not fitted (fitted: {', '.join(known)})")
    kept = tuple(one for one in gains.gains if one.method in options.selectors)
    return replace(gains, gains=kept)


def asked_aim(options: argparse.Namespace, gains: Gains) -> Aim:
    """Return budget and limits."""
    if options.task is None and len(gains.tasks) > 1:
        raise ConfigError(f"the gains are of {', '.join(gains.tasks)}; name one (--task)")
    return Aim(
        budget=read_number(options.flops, "--flops"),
        task=options.task or gains.tasks[0],
        shares=tuple(options.share),
        max_epochs=options.max_epochs,
        per_nat=options.per_nat,
    )


def asked_bases(options: argparse.Namespace) -> list[Base]:
    """Return the configuration with each of the models."""
    files = tuple(options.conf_file)
    each = [(*files, model) for model in options.models] or [files]
    return [
        Base(files=names, conf_dir=options.conf_dir, overrides=tuple(options.overrides))
        for names in each
    ]


def open_models(bases: Sequence[Base]) -> tuple[list[Model], float, dict[str, float]]:
    """Return the models by price, the tokens of the corpus, and the mixture as configured.

    Raises:
        ConfigError: a configuration is refused.
        DataError: the data cannot be opened.
    """
    models: list[Model] = []
    tokens, weights = 0.0, dict[str, float]()
    for base in bases:
        config = base.load()
        domains = open_run_domains(config)
        try:
            spec = complete(config, domains).model
            models.append(known_model(spec, Path(base.files[-1]).stem))
            tokens = float(np.sum(domains.token_counts))
            shares = start_weights(config.mixing, config.domains, domains)
            weights = dict(zip(domains.names, map(float, shares), strict=True))
        finally:
            domains.close()
    return models, tokens, weights


def asked_mixing(
    options: argparse.Namespace, gains: Gains, weights: dict[str, float]
) -> tuple[list[MixingOption], list[str]]:
    """Return the ways of mixing that are tried, and why others are not."""
    count = min(len(one.draws) for one in gains.gains)
    found, left_out = [base_option(count)], list[str]()
    if options.league is not None:
        more, left_out = league_options(
            options.league, task=options.league_task, replicates=count, seed=options.seed
        )
        names = [one.name for one in more]
        for name in options.methods or ():
            if name not in names:
                raise ConfigError(f"--methods {name}: no option (there are: {', '.join(names)})")
        found += [one for one in more if options.methods is None or one.name in options.methods]
    elif options.methods or options.league_task:
        raise ConfigError("--methods and --league-task are of a comparison; give it by --league")
    if options.law is not None:
        found.append(
            law_option(
                options.law,
                domains=tuple(weights),
                base=weights,
                replicates=count,
                seed=options.seed,
            )
        )
    return found, left_out


def write_runs(
    options: argparse.Namespace,
    bases: Sequence[Base],
    models: Sequence[Model],
    found: Sequence[Candidate],
) -> tuple[list[Proposal], list[str]]:
    """Write the runs of the best rows; return them, and why some are not written."""
    scorers = {}
    for text in options.scorer:
        name, is_pair, model = text.partition("=")
        if not is_pair:
            raise ConfigError(f"--scorer {text}: write METHOD=MODEL, such as ppl=runs/small")
        if name not in SCORED_BY_MODELS:
            raise ConfigError(
                f"--scorer {text}: '{name}' scores by no model"
                f"{did_you_mean(name, SCORED_BY_MODELS)} "
                f"(these do: {', '.join(SCORED_BY_MODELS)})"
            )
        scorers[name] = model
    choosing = Choosing(
        targets=tuple(options.target), scorers=scorers, checkpoints=options.less_checkpoints
    )
    by_model = dict(zip(models, bases, strict=True))
    written, not_written = [], []
    gpus = len(detect_devices(os.environ).cuda)
    for place, one in enumerate(found[: options.top], start=1):
        base = by_model[one.model]
        try:
            written.append(write_proposal(base, one, place, options.out, choosing, gpus=gpus))
        except ConfigError as error:
            not_written.append(f"row {place}: {error}")
    return written, not_written
