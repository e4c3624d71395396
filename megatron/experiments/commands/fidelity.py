"""Compare what online methods think that domains do with what the domains do.

  tools/mix.py fidelity local/quickstart -d configs --methods mixing/aioli mixing/odm --points 3

Every method is run once, and keeps its checkpoints at some points.  From each of them short
children start, one mostly on each domain and some others; the linear dynamic law of their
losses is the true A* of that point (Aioli, arXiv 2411.05735, section 4).  Its fidelity is half
the cosine and half the rank correlation of its column sums and those of the method's own A.

In --out: fidelity.json (every A), summary.md, report.html, and the table of all runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.config import Config
from megatron.errors import ConfigError, did_you_mean
from megatron.experiments.children import (
    PARENT,
    check_kept,
    checked_steps,
    child_mixtures,
    child_variants,
    keeping,
    point_steps,
)
from megatron.experiments.conduct import (
    add_study_arguments,
    base_of,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.execute import Outcome
from megatron.experiments.fidelity import PointFidelity, facts, point_fidelity, text
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.study import Base, PlannedRun, Study, Variant, plan_study
from megatron.experiments.table import study_rows, write_table
from megatron.registry import mixing_methods

NAME = "fidelity"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    add_study_arguments(parser, out="runs/studies/fidelity")
    own = parser.add_argument_group("points and children")
    own.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="configuration files with a mixing block each (mixing/aioli), or names of methods "
        "with their defaults (default: the configuration's method)",
    )
    own.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of every method's run")
    own.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="points that divide the run evenly (default: 3)",
    )
    own.add_argument(
        "--at", type=int, nargs="+", metavar="STEP", help="the points themselves, as steps"
    )
    own.add_argument(
        "--child-steps",
        type=int,
        default=20,
        metavar="N",
        help="length of a child (default: 20): too short is noise, too long is no longer linear",
    )
    own.add_argument(
        "--own-share",
        type=float,
        default=0.8,
        metavar="P",
        help="of its own domain in a child; 1 trains on it alone (default: 0.8)",
    )
    own.add_argument(
        "--extra",
        type=int,
        metavar="N",
        help="children beside one per domain, the even mixture first; they show by R² whether "
        "the law is linear (default: 1)",
        default=1,
    )


def run(options: argparse.Namespace) -> int:
    """Run methods and children; return the exit code."""
    if options.points is not None and options.at is not None:
        raise ConfigError("--points and --at exclude each other: choose one")
    if options.child_steps < 1:
        raise ConfigError(f"--child-steps is {options.child_steps}; give a number from 1 on")
    base = base_of(options)
    points = [point for each in _methods(options, base) for point in each]
    parents = tuple({point.parent.key: point.parent for point in points}.values())
    if options.dry_run:
        conduct(_study(parents, points), options)
        return 0
    outcome = conduct(Study(name=NAME, runs=parents), options)
    if outcome is None or outcome.stopped:
        return 0 if outcome is None else outcome.exit_code
    done = {run.key for run in outcome.finished}
    whole = [point for point in points if point.parent.key in done]
    for point in whole:
        check_kept(point.parent, [point.step])
    if whole:
        # Those that failed were tried often enough; their children have nothing to start from.
        lived = [run for run in parents if run.key in done]
        more = conduct(_study(lived, whole), options)
        if more is None or more.stopped:
            return 0 if more is None else more.exit_code
        outcome = replace(more, failed=(*outcome.failed, *more.failed))
    return _write(points, outcome, options)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A step of a method's run, and the children that start there."""

    parent: PlannedRun
    step: int
    children: tuple[PlannedRun, ...]


def _study(parents: Sequence[PlannedRun], points: Sequence[_Point]) -> Study:
    children = [child for point in points for child in point.children]
    return Study(name=NAME, runs=(*parents, *children))


def _methods(options: argparse.Namespace, base: Base) -> list[list[_Point]]:
    """Plan every method's run with its points."""
    given: list[str | None] = list(options.methods or [None])
    if len(set(given)) < len(given):
        raise ConfigError(f"--methods {' '.join(map(str, given))}: give each once")
    return [_plan(options, base, method) for method in given]


def method_base(base: Base, method: str | None) -> tuple[str | None, Base, tuple[str, ...]]:
    """Return what ``--methods`` names: its label, the files, and overrides for its mixing.

    A configuration file comes after the study's own.  A method's name takes its defaults,
    and the configuration's options where that has the same method.
    """
    if method is None:
        return None, base, ()
    if method not in mixing_methods:
        file = Path(base.conf_dir or ".") / f"{method}.yml"
        if not ("/" in method or "." in method or file.exists()):
            hint = did_you_mean(method, sorted(mixing_methods))
            raise ConfigError(
                f"--methods: '{method}' is neither a method nor a configuration file{hint}"
            )
        return Path(method).stem, replace(base, files=(*base.files, method)), ()
    return method, base, named_method(base.load(), method)


def named_method(config: Config, method: str) -> tuple[str, ...]:
    """Return the overrides that put a method in the place of the configuration's."""
    mixing = config.mixing
    if mixing.method == method:
        return ()
    block = {
        "method": method,
        "lag": mixing.lag,
        "unit": mixing.unit,
        "draw": mixing.draw,
        "on_exhausted": mixing.on_exhausted,
        "validation_samples": mixing.validation_samples,
    }
    if mixing.weights is not None:
        block |= {"weights": mixing.weights, "weights_alpha": mixing.weights_alpha}
    return ("mixing=null", f"mixing={json.dumps(block)}")


def _plan(options: argparse.Namespace, base: Base, method: str | None) -> list[_Point]:
    label, own, overrides = method_base(base, method)
    config = own.load(overrides)
    name = label or config.mixing.method
    seeds = list(options.seeds or [config.training.seed])
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: give each once")
    total = config.training.train_iters
    steps = checked_steps(options.at, total) if options.at else point_steps(total, _count(options))
    mixtures = child_mixtures(
        len(config.trained), share=options.own_share, extra=options.extra, seed=0
    )
    folder, gpus = runs_dir(options), gpus_of(options, own)
    variants = [
        Variant(
            name=f"{name}-seed-{seed}",
            overrides=(*overrides, f"seed={seed}"),
            tags={"label": name, "role": PARENT},
        )
        for seed in seeds
    ]
    planned = plan_study(NAME, own, variants, folder, gpus=gpus)
    parents = [keeping(run, steps) for run in planned.runs]
    places = [(run, number, step) for run in parents for number, step in enumerate(steps, 1)]
    wanted = [
        child_variants(run, step, mixtures, steps=options.child_steps, number=number)
        for run, number, step in places
    ]
    every = plan_study(NAME, own, [one for some in wanted for one in some], folder, gpus=gpus)
    count = len(mixtures)
    return [
        _Point(parent=run, step=step, children=every.runs[place * count : (place + 1) * count])
        for place, (run, _, step) in enumerate(places)
    ]


def _count(options: argparse.Namespace) -> int:
    return 3 if options.points is None else int(options.points)


def _write(points: Sequence[_Point], outcome: Outcome, options: argparse.Namespace) -> int:
    """Compare at every point whose runs are whole; write what was found."""
    out: Path = options.out
    done = {run.key for run in outcome.finished}
    rows = study_rows(NAME, outcome.finished)
    found: list[PointFidelity] = []
    missing = [f"{failure.run.name}: {failure.why}" for failure in outcome.failed]
    for point in points:
        if done >= {point.parent.key, *(child.key for child in point.children)}:
            found.append(point_fidelity(point.parent, point.step, point.children, rows))
    out.mkdir(parents=True, exist_ok=True)
    summary = text(found, missing, child_steps=options.child_steps)
    results = facts(found, child_steps=options.child_steps)
    for path, content in (
        (out / "fidelity.json", json.dumps(results, indent=1, ensure_ascii=False)),
        (out / "summary.md", summary),
    ):
        with disk_errors(path):
            replace_file(path, content.encode())
    tables = write_table(rows, out)
    print(summary, end="")
    why = {failure.run.name: failure.why for failure in outcome.failed}
    report = write_report(out, command=command_line(options), failed=why)
    written = [out / "fidelity.json", out / "summary.md", *tables, report]
    print("written: " + " ".join(map(str, written)))
    for line in missing:
        print(f"failed: {line}")
    if missing:
        print("give the same command again to try the failed runs once more")
    return outcome.exit_code
