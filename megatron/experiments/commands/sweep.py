"""Train on many fixed mixtures and find the best of them.

  tools/mix.py sweep local/quickstart -d configs --design grid --points 4 --seeds 1 2 --jobs 2

The design says which mixtures: a grid of the simplex, draws from a Dirichlet distribution, draws
that keep apart (spread), or every domain alone (one-hot).  Each is trained with every seed.  The
best is that with the lowest held-out loss, averaged over domains and seeds, at the end.

In --out: table.csv and table.parquet with every held-out loss, summary.md, report.html, and
mixture.yml, which the next run takes beside its own files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray, make_bounds
from megatron.experiments.conduct import (
    add_study_arguments,
    base_of,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.designs import dirichlet, grid, one_hot, well_spread
from megatron.experiments.execute import Outcome
from megatron.experiments.fixed_mixtures import (
    add_draw_arguments,
    add_seeds_argument,
    how_it_ended,
    measured_tokens,
    named_points,
    plan_mixtures,
    prior_of,
)
from megatron.experiments.limits import add_bound_arguments
from megatron.experiments.points import PointResult, point_results, summary
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.study import Study
from megatron.experiments.table import write_table
from megatron.training.product import write_mixture

DESIGNS = ("grid", "dirichlet", "spread", "one-hot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    add_study_arguments(parser, out="runs/studies/sweep")
    which = parser.add_argument_group("which mixtures")
    which.add_argument(
        "--design", choices=DESIGNS, default="spread", help="how they are chosen (default: spread)"
    )
    which.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="how many (default: 8 per domain); for grid: parts that an edge has (default: 4)",
    )
    add_seeds_argument(which)
    add_draw_arguments(which)
    add_bound_arguments(which)


def run(options: argparse.Namespace) -> int:
    """Run the sweep; return the exit code."""
    base = base_of(options)
    config = base.load()
    tokens = measured_tokens(config, all_of=False)
    points = design_points(options, tuple(config.trained), prior_of(options, tokens))
    study = plan_mixtures(
        base, points, options.seeds, runs_dir(options), name="sweep", gpus=gpus_of(options, base)
    )
    outcome = conduct(study, options)
    if outcome is None:
        return 0
    if outcome.stopped:
        return outcome.exit_code
    code = write_results(study, outcome, options.out)
    why = {failure.run.name: failure.why for failure in outcome.failed}
    print(write_report(options.out, command=command_line(options), failed=why))
    return code


def design_points(
    options: argparse.Namespace, domains: Sequence[str], prior: FloatArray | None = None
) -> list[dict[str, float]]:
    """Return the mixtures that the command line asks for, by domain.

    Args:
        options: of the command.
        domains: that are trained on, K.
        prior: centre of the random designs, [K]; all alike if None.

    Raises:
        ConfigError: a number is out of range.
    """
    bounds = make_bounds(domains, floor=options.floor, ceiling=options.ceiling)
    return named_points(_design(options, bounds, prior), domains)


def _design(options: argparse.Namespace, bounds: Bounds, prior: FloatArray | None) -> FloatArray:
    if options.points is not None and options.points < 1:
        raise ConfigError(f"--points is {options.points}; give a number from 1 on")
    if options.design == "one-hot":
        if options.points is not None:
            raise ConfigError("--points does not go with --design one-hot: it has one per domain")
        return one_hot(bounds)
    if options.design == "grid":
        return grid(bounds, parts=options.points or 4)
    draw = dirichlet if options.design == "dirichlet" else well_spread
    return np.asarray(
        draw(
            bounds,
            count=options.points or 8 * bounds.count,
            seed=options.design_seed,
            concentration=options.concentration,
            prior=prior,
        )
    )


def write_results(study: Study, outcome: Outcome, out: Path) -> int:
    """Write table, summary and the best mixture of a sweep; return the exit code.

    The table holds the runs that have ended.  Those that failed are named in the summary, and
    their mixtures cannot be the best.
    """
    ended = how_it_ended(study, outcome)
    out.mkdir(parents=True, exist_ok=True)
    results = point_results(ended.rows)
    wanted = {int(run.tags["point"]) for run in study.runs}
    whole = [result for result in results if result.point in wanted - ended.broken]
    path = out / "summary.md"
    with disk_errors(path):
        replace_file(path, summary(study, results, ended.failed).encode())
    written = [path, *write_table(ended.rows, out)]
    if whole:
        written.append(_write_best(study, whole[0], out))
        best = ", ".join(f"{name} {p:.4g}" for name, p in whole[0].weights.items())
        print(f"best mixture: {best} (average held-out loss {whole[0].mean:.4f})")
    print("written: " + " ".join(map(str, written)))
    ended.tell()
    return outcome.exit_code


def _write_best(study: Study, best: PointResult, out: Path) -> Path:
    weights = np.array([best.weights[name] for name in study.domains])
    seeds = f"{best.seeds} seed{'s' if best.seeds > 1 else ''}"
    path = write_mixture(
        out,
        study.domains,
        lambda: weights,
        method=f"a sweep over {len({run.tags['point'] for run in study.runs})} mixtures, {seeds},",
        step=study.runs[0].steps,
    )
    assert path is not None
    return path
