"""Compare mixing methods at equal budgets, seed by seed, on one task or many.

  tools/mix.py compare STUDY.yml --jobs 2

The study file names tasks (configurations), methods, seeds and a baseline.  A method's validations,
probes, gradients, reference passes, references and proxies are charged to it: what costs more
trains for fewer steps, so that every method spends the FLOPs of the baseline's run.  The same seed
gives all methods the same initial weights and the same samples of every domain in the same order.
docs/experiments.md describes the file, the charges and the results.

In --out: compare.json with everything that was found, summary.md, report.html, table.csv and
table.parquet with the held-out losses of all runs, plan.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.experiments.compare.contestants import sweep_points
from megatron.experiments.compare.league import League, StageStudy, form_league, write_plan
from megatron.experiments.compare.playing import Played, play
from megatron.experiments.compare.results import compare_facts, write_compare
from megatron.experiments.compare.study_file import read_study_file
from megatron.experiments.compare.text import compare_text
from megatron.experiments.conduct import (
    add_run_arguments,
    add_set_argument,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.estimate import estimate
from megatron.experiments.execute import Outcome
from megatron.experiments.finished import read_finish
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.table import study_rows, write_table
from megatron.monitor.throughput import duration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="the study file")
    add_set_argument(parser)
    add_run_arguments(parser, out="runs/studies/compare")
    which = parser.add_argument_group("which part of the study")
    which.add_argument("--tasks", nargs="+", metavar="NAME", help="only these tasks")
    which.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these methods, and the baseline"
    )
    which.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")


def run(options: argparse.Namespace) -> int:
    """Run the comparison; return the exit code."""
    file = read_study_file(options.study, options.overrides).only(
        tasks=options.tasks, methods=options.methods, seeds=options.seeds
    )
    gpus = gpus_of(options, file.tasks[0].base)
    league = form_league(file, gpus=gpus)
    for line in plan_lines(league):
        print(line)

    rate: float | None = options.rate

    def carried(study: StageStudy) -> Outcome | None:
        nonlocal rate
        rate = rate or estimate(study, jobs=options.jobs).rate
        return conduct(study, options)

    played = play(league, runs_dir(options), carried, gpus=gpus)
    if options.dry_run:
        print(total_line(league, jobs=options.jobs, rate=rate))
    if played.halted:
        return played.exit_code
    code = write_results(league, played, options.out)
    failed = dict(line.split(": ", 1) for line in played.failed)
    print(write_report(options.out, command=command_line(options), failed=failed))
    return code


def write_results(league: League, played: Played, out: Path) -> int:
    """Write and show what was found; return the exit code."""
    finished = [run for run in played.runs if read_finish(run) is not None]
    rows = study_rows(league.file.name, finished)
    facts = compare_facts(league, played, rows)
    text = compare_text(facts)
    summary = out / "summary.md"
    written = [write_compare(facts, out), summary, write_plan(league, played.runs, out)]
    with disk_errors(summary):
        replace_file(summary, text.encode())
    written += write_table(rows, out)
    print(text, end="")
    print("written: " + " ".join(map(str, written)))
    for line in played.failed:
        print(f"failed: {line}")
    if played.failed:
        print("give the same command again to try the failed runs once more")
    left_out = any(task["left_out"] for task in facts["tasks"].values())
    return played.exit_code or int(left_out)


def plan_lines(league: League) -> list[str]:
    """Return a line for every method on every task: how its budget is divided."""
    lines = []
    for entry in league.entries:
        plan = entry.plan
        before = "".join(f"{leg.count} {leg.role} of {leg.steps} steps, " for leg in plan.search)
        lines.append(
            f"{entry.task.name}, {entry.method.name}: {before}{plan.final.steps} steps; "
            f"{plan.charges.total / league.budgets[entry.task.name]:.1%} of the baseline's FLOPs"
        )
    return lines


def total_line(league: League, *, jobs: int, rate: float | None) -> str:
    """Return what all stages take together, those that cannot be planned yet included.

    Args:
        league: who takes part.
        jobs: runs at a time.
        rate: FLOPs a second of one run; None: not known.
    """
    runs, flops = 0, 0.0
    for entry in league.entries:
        legs = (*entry.plan.search, entry.plan.final)
        runs += len(entry.task.seeds) * sum(leg.count for leg in legs)
        flops += len(entry.task.seeds) * entry.plan.charges.total
    oracle = league.file.oracle
    for task in league.file.tasks if oracle is not None else ():
        assert oracle is not None
        points = len(sweep_points(oracle.sweep, league.domains[task.name], seed=0))
        more = points * len(oracle.seeds) + len(task.seeds)
        runs, flops = runs + more, flops + more * league.budgets[task.name]
    time = "" if rate is None else f"; about {duration(flops / rate / jobs)}, {jobs} at once"
    return f"all stages: at most {runs} runs, {flops:.3g} FLOPs with all charges{time}"
