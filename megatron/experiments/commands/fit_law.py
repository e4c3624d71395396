"""Fit Data Mixing Laws' static law to the runs of a sweep and find the mixture it calls best.

  tools/mix.py fit-law runs/studies/sweep --floor 0.05 --max-epochs 4 --tokens 300e9
  tools/mix.py fit-law runs/studies/short runs/studies/mid runs/studies/long --at-steps 20000

The law is L_i(p) = c_i + exp(-A_i p) for every domain i that is measured (arXiv 2403.16952 with
b = 1).  It is fitted to the losses at the end of the sweep's runs; the R² of runs that it was not
fitted to, and bootstrap intervals of the best mixture and its loss, say how far to trust it.

With --at-steps or --at-size every mixture's losses are first carried there by power laws over the
steps and sizes of the studies' runs, and the law is fitted to what these predict.

In --out: law.json (the law and how sure it is), law.md, report.html, and mixture.yml for the next
run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds
from megatron.experiments.carried import Carried, carried_facts, carried_text, carry
from megatron.experiments.earlier import read_plan
from megatron.experiments.limits import (
    add_aim_arguments,
    add_bound_arguments,
    asked_bounds,
    objective,
)
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.runs_array import RunsArray, runs_array
from megatron.experiments.static_bootstrap import StaticIntervals, static_intervals
from megatron.experiments.static_law import StaticFit, fit_static_law, held_out_r2
from megatron.experiments.swept_runs import read_runs
from megatron.experiments.table import read_table
from megatron.training.product import write_mixture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument(
        "study",
        type=Path,
        nargs="+",
        metavar="STUDY",
        help="--out of a sweep; of several with the same mixtures, at other lengths or sizes",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results (default: 'law' in the first STUDY)"
    )
    target = parser.add_argument_group("a longer run, or a larger model")
    target.add_argument(
        "--at-steps",
        type=int,
        metavar="N",
        help="carry the losses to a run of so many steps (default: the longest, as measured)",
    )
    target.add_argument(
        "--at-size",
        type=float,
        metavar="N",
        help="carry the losses to a model of so many parameters (default: as measured)",
    )
    target.add_argument(
        "--own-exponents",
        action="store_true",
        help="let every mixture have an exponent of its own in these laws, which takes four "
        "lengths or sizes (default: one for all mixtures, which takes three)",
    )
    add_bound_arguments(parser)
    add_aim_arguments(parser)
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="of intervals (default: 0.95)"
    )
    parser.add_argument(
        "--replicates", type=int, default=400, metavar="N", help="of the bootstrap (default: 400)"
    )


def run(options: argparse.Namespace) -> int:
    """Fit the law and write what it says; return the exit code."""
    first = options.study[0]
    plan = read_plan(first)
    sizes: dict[str, float] = plan["domain_tokens"]
    carried = asked_carried(options)
    runs = runs_array(read_table(first), list(sizes)) if carried is None else carried.runs
    bounds = asked_bounds(options, sizes, float(runs.tokens.max()))
    weights = objective(options.objective, runs.measured)
    fit = fit_static_law(runs.mixtures, runs.losses)
    # Asked for beside the runs themselves: the even mixture, which most readers compare with.
    even = bounds.nearest(np.full(bounds.count, 1 / bounds.count))
    sure = static_intervals(
        fit,
        bounds,
        at=even[None],
        weights=weights,
        confidence=options.confidence,
        replicates=options.replicates,
    )
    unseen = unseen_r2(runs)
    facts = law_facts(runs, fit, sure, unseen, bounds) | carried_facts(carried)
    out = options.out or first / "law"
    out.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (out / "law.json", json.dumps(facts, indent=1, ensure_ascii=False)),
        (out / "law.md", law_text(facts)),
    ):
        with disk_errors(path):
            replace_file(path, text.encode())
    write_mixture(
        out,
        runs.domains,
        lambda: sure.optimum.mixture,
        method=f"a static law of {len(runs.runs)} runs",
        step=int(plan["runs"][0]["steps"]) if carried is None else carried.steps,
    )
    print(law_text(facts), end="")
    report = write_report(out, command=command_line(options))
    print(f"written: {out / 'law.json'} {out / 'law.md'} {out / 'mixture.yml'} {report}")
    return 0


def asked_carried(options: argparse.Namespace) -> Carried | None:
    """Return the losses at the steps and size that are asked for; None: as one study has them."""
    asked = options.at_steps is not None or options.at_size is not None
    if not asked and options.own_exponents:
        raise ConfigError("--own-exponents belongs to --at-steps or --at-size; give one of them")
    if not asked and len(options.study) == 1:
        return None
    return carry(
        *read_runs(options.study),
        steps=options.at_steps,
        size=options.at_size,
        shared_exponent=not options.own_exponents,
    )


def unseen_r2(runs: RunsArray) -> list[float] | None:
    """Return the R² of runs that were left out of the fit, [M]; None if there are too few."""
    try:
        return [float(value) for value in held_out_r2(runs.mixtures, runs.losses)]
    except ConfigError:
        return None


def law_facts(
    runs: RunsArray,
    fit: StaticFit,
    sure: StaticIntervals,
    unseen: list[float] | None,
    bounds: Bounds,
) -> dict[str, Any]:
    """Return everything that is known of a law, JSON-able."""
    best = sure.optimum
    return {
        "form": "loss_i(p) = c_i + exp(-sum_j A_ij p_j)",
        "runs": len(runs.runs),
        "domains": list(runs.domains),
        "measured": list(runs.measured),
        "c": fit.law.constant.tolist(),
        "A": fit.law.rate.tolist(),
        "r2": fit.r2.tolist(),
        "r2_held_out": unseen,
        "confidence": sure.confidence,
        "floor": bounds.floor.tolist(),
        "ceiling": bounds.ceiling.tolist(),
        "mixture": best.mixture.tolist(),
        "mixture_low": sure.mixture.low.tolist(),
        "mixture_high": sure.mixture.high.tolist(),
        "objective": best.value,
        "objective_low": float(sure.value.low),
        "objective_high": float(sure.value.high),
        "losses": best.losses.tolist(),
        "best_run": float(runs.losses.mean(axis=1).min()),
        "fitted": [
            {"run": name, "mixture": mixture.tolist(), "losses": losses.tolist()}
            for name, mixture, losses in zip(runs.runs, runs.mixtures, runs.losses, strict=True)
        ],
    }


def law_text(facts: dict[str, Any]) -> str:
    """Return what a law says, in Markdown."""
    percent = f"{facts['confidence']:.0%}"
    lines = [
        f"# Static law of {facts['runs']} runs",
        "",
        f"Best mixture, with {percent} bootstrap intervals of each weight:",
        "",
        "| domain | weight | low | high |",
        "|---|---|---|---|",
    ]
    columns = (facts["domains"], facts["mixture"], facts["mixture_low"], facts["mixture_high"])
    for name, weight, low, high in zip(*columns, strict=True):
        lines.append(f"| {name} | {weight:.4f} | {low:.4f} | {high:.4f} |")
    lines += [
        "",
        f"Predicted objective there: {facts['objective']:.4f} "
        f"({facts['objective_low']:.4f} to {facts['objective_high']:.4f}) nats per token; the "
        f"lowest average loss of a run was {facts['best_run']:.4f}.",
        "",
        "| measured | c | R² | R² of runs left out | predicted loss |",
        "|---|---|---|---|---|",
    ]
    unseen = facts["r2_held_out"] or [None] * len(facts["measured"])
    rows = (facts["measured"], facts["c"], facts["r2"], unseen, facts["losses"])
    for name, constant, r2, left_out, loss in zip(*rows, strict=True):
        shown = "too few runs" if left_out is None else f"{left_out:.3f}"
        lines.append(f"| {name} | {constant:.4f} | {r2:.3f} | {shown} | {loss:.4f} |")
    return "\n".join([*lines, *carried_text(facts.get("carried"))]) + "\n"
