"""Fit the law of gains to runs: what performance a selector buys with how much compute.

    tools/select_data.py fit runs.csv --better higher --best 1 --unit accuracy --out plans/exam
    tools/select_data.py fit --runs runs/ft-* --better lower --unit "nats per token" --out plans/own

The law is P0 + (P̄ - P0) (1 - exp(-λ C / C_total)) of every task, model size and selector
(arXiv 2410.16208), by scipy's curve_fit within bounds.  C is the compute of training, what was
spent on choosing coming before it; with --compute total it is both together, as the paper writes.

In --out: gains.json for `plan` and for `tools/mix.py budget`, fit.md, figures as PNG, report.html.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.checkpoint.files import write_text
from megatron.errors import ConfigError
from megatron.selection.break_even import BreakEven
from megatron.selection.budget_fit import FitRequest, fit_runs, read_ceilings
from megatron.selection.budget_report import write_report
from megatron.selection.budget_runs import Run, read_runs
from megatron.selection.budget_text import fit_text, least
from megatron.selection.commands.planning import (
    add_break_even_arguments,
    add_price_arguments,
    asked_prices,
    command_words,
    found_break_even,
    refuse_idle_prices,
)
from megatron.selection.commands.shared import parser_of
from megatron.selection.cost_model import sized_model
from megatron.selection.figures import Picture
from megatron.selection.figures_fit import fixed_budget_figure, performance_figure
from megatron.selection.figures_plan import break_even_figure, simulation_figure
from megatron.selection.finished_runs import is_loss, read_finished
from megatron.selection.flags import refuse_idle
from megatron.selection.gain_fit import BETTER, INTERVALS, LEAST_REPLICATES, FitOptions
from megatron.selection.gains import COMPUTE, Gains, sizes_of, write_gains
from megatron.selection.prices import Prices
from megatron.selection.similarity import (
    Similarity,
    read_score_names,
    similarity,
    similarity_figure,
)


def make_parser(prog: str, words: list[str]) -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = parser_of(prog, __doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument(
        "table",
        nargs="*",
        type=Path,
        metavar="TABLE",
        help="CSV, JSONL or Parquet, a row for each run: method, size, performance, one of flops, "
        "training_flops and tokens; maybe task, selection_flops, total_flops, ceiling, seed",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="DIR",
        help="folders of finished runs of train.py, or folders of such folders",
    )
    parser.add_argument(
        "--measure",
        default="loss",
        metavar="WHAT",
        help="of those: loss (mean over held-out domains), loss/DOMAIN, or TASK/METRIC of "
        "evaluate.py (default: loss)",
    )
    parser.add_argument("--task", default="target", metavar="NAME", help="of those, in tables")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    law = parser.add_argument_group("the law")
    law.add_argument(
        "--better",
        choices=BETTER,
        help="performance (default: lower for the losses of --runs, else higher)",
    )
    law.add_argument(
        "--best", type=float, metavar="P", help="of a score: the best there can be (1 or 100)"
    )
    law.add_argument(
        "--ceiling",
        nargs="+",
        action="extend",
        default=[],
        metavar="P",
        help="P̄ where it is known: 0.6, or by size 7B=0.55 13B=0.6 (default: fitted)",
    )
    law.add_argument(
        "--compute",
        choices=COMPUTE,
        default="training",
        help="what C is: training alone, or total, choosing and training (default: training)",
    )
    law.add_argument(
        "--unit",
        metavar="TEXT",
        help="for tables and axes (default: nats per token for losses of --runs)",
    )
    law.add_argument(
        "--intervals",
        choices=INTERVALS,
        default="covariance",
        help="from the linearised fit, or by resampled residuals (default: covariance)",
    )
    law.add_argument("--confidence", type=float, default=0.95, metavar="C")
    law.add_argument(
        "--replicates", type=int, default=400, metavar="N", help="draws of every law (default: 400)"
    )
    law.add_argument("--seed", type=int, default=0, help="of the draws")
    add_price_arguments(parser)
    add_break_even_arguments(parser)
    alike = parser.add_argument_group("how alike the choices are")
    alike.add_argument(
        "--scores",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="tables of score of one corpus; NAME:low=FILE chooses the lowest",
    )
    alike.add_argument(
        "--similarity-share",
        type=float,
        default=0.05,
        metavar="S",
        help="part of the documents that each chooses (default: 0.05)",
    )


def run(options: argparse.Namespace) -> int:
    """Fit the laws and write what they say; return the exit code."""
    _check(options)
    fill(options)
    tables = read_score_names(options.scores)
    alike = similarity(tables, options.similarity_share) if tables else None
    prices = asked_prices(options)
    gains = fit_runs(asked_runs(options), asked_request(options, prices))
    text = fit_text(gains)
    pictures, break_even, skipped = fit_pictures(gains, prices, options, alike)
    out: Path = options.out
    written = [write_gains(gains, out), write_text(out / "fit.md", text)]
    written += [picture.write(out) for picture in pictures]
    print(text, end="")
    for line in skipped:
        print(f"not drawn: {line}")
    written.append(
        write_report(
            out,
            title="Gains of choosing",
            command=command_words(options),
            tiles=_tiles(gains),
            sentences=_sentences(gains, break_even, max(options.shares)),
            markdown=text,
            pictures=pictures,
        )
    )
    print("written: " + " ".join(map(str, written)))
    for name, why in gains.left_out.items():
        print(f"not fitted: {name}: {why}", file=sys.stderr)
    return int(bool(gains.left_out))


def _check(options: argparse.Namespace) -> None:
    if not options.table and not options.runs:
        raise ConfigError("there are no runs; give a table of them, or --runs DIR")
    if not 0 < options.confidence < 1:
        raise ConfigError(f"--confidence is {options.confidence:g}; it must be between 0 and 1")
    if options.replicates < LEAST_REPLICATES:
        raise ConfigError(
            f"--replicates is {options.replicates}; draws that give intervals are "
            f"{LEAST_REPLICATES} or more"
        )
    flags = make_parser("fit", [])
    if not options.runs:
        refuse_idle(options, flags, ["measure", "task"], "--runs")
    if not options.scores:
        refuse_idle(options, flags, ["similarity-share"], "--scores")
    refuse_idle_prices(options)


def fill(options: argparse.Namespace) -> None:
    """Give losses of finished runs their direction and unit, unless others are asked for."""
    losses = bool(options.runs) and is_loss(options.measure)
    if losses and options.table and options.better is None:
        raise ConfigError(
            "the folders of --runs give losses, and a table may give others; say by --better "
            "whether a higher or a lower performance is better"
        )
    options.better = options.better or ("lower" if losses else "higher")
    if options.better == "lower" and options.best is not None:
        raise ConfigError(
            f"--best {options.best:g}: it bounds scores, and losses are bounded by 0; leave it out"
        )
    options.unit = options.unit or ("nats per token" if losses else "performance")


def asked_runs(options: argparse.Namespace) -> list[Run]:
    """Return the runs of all tables and folders."""
    found = read_runs(options.table)
    if options.runs:
        found += read_finished(options.runs, measure=options.measure, task=options.task)
    return found


def asked_request(options: argparse.Namespace, prices: Prices) -> FitRequest:
    """Return what is asked of the fit; ``prices`` may know the corpus."""
    return FitRequest(
        options=FitOptions(
            better=options.better,
            best=options.best,
            confidence=options.confidence,
            intervals=options.intervals,
            replicates=options.replicates,
            seed=options.seed,
        ),
        compute=options.compute,
        unit=options.unit,
        ceilings=read_ceilings(options.ceiling),
        corpus_tokens=None if prices.reading is None else prices.reading.corpus,
    )


def fit_pictures(
    gains: Gains, prices: Prices, options: argparse.Namespace, alike: Similarity | None
) -> tuple[list[Picture], dict[str, list[BreakEven]], list[str]]:
    """Return the figures that the runs allow, the break-even sizes, and why others are not there.

    Break-even sizes are those of the tasks whose prices are known.
    """
    pictures: list[Picture | None] = []
    break_even: dict[str, list[BreakEven]] = {}
    skipped = []
    for task in gains.tasks:
        pictures += [performance_figure(gains, task), fixed_budget_figure(gains, task)]
        models = [sized_model(size) for size in sizes_of(gains.of(task))]
        try:
            found = break_even[task] = found_break_even(gains, task, prices, options)
            pictures.append(break_even_figure(gains, task, prices, found, options.against))
            if not found:
                skipped.append(
                    f"break-even sizes of {task}: no selector that costs something stands beside "
                    "one that does not"
                )
            pictures.append(simulation_figure(gains, task, models, prices))
        except ConfigError as error:
            skipped.append(f"break-even sizes and simulation of {task}: {error}")
    if alike is not None:
        pictures.append(similarity_figure(alike))
    else:
        skipped.append("how alike the choices are: give tables of scores (--scores)")
    return [picture for picture in pictures if picture is not None], break_even, skipped


def _tiles(gains: Gains) -> list[tuple[str, str]]:
    return [
        ("laws", str(len(gains.gains))),
        ("runs", str(sum(len(one.flops) for one in gains.gains))),
        ("tasks", ", ".join(gains.tasks)),
        ("intervals", f"{gains.confidence:.0%}, {gains.intervals}"),
    ]


def _sentences(
    gains: Gains, break_even: Mapping[str, Sequence[BreakEven]], share: float
) -> tuple[list[str], list[str]]:
    main = []
    for task, found in break_even.items():
        for one in [one for one in found if one.share == share]:
            beats = (
                f"beats {one.against} from {least(one.size)} on"
                if math.isfinite(one.size)
                else f"never beats {one.against}"
            )
            main.append(
                f"{task}: {one.method} {beats}, with a budget of {one.share:.0%} of the corpus."
            )
    rest = [f"Not fitted: {name}: {why}." for name, why in gains.left_out.items()]
    worst = min(gains.gains, key=lambda one: one.r2)
    rest.append(f"The laws explain {worst.r2:.1%} or more of the runs' variance ({worst.name}).")
    return main or [f"{len(gains.gains)} laws were fitted."], rest
