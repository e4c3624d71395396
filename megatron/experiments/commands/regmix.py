"""Predict losses from mixtures by regression on many small proxies, and find the best mixture.

  tools/mix.py regmix local/quickstart -d configs --proxies 64 --jobs 2
  tools/mix.py regmix --study runs/studies/sweep --objective code=2,prose=1

RegMix (arXiv 2407.01492): proxies train on mixtures drawn from a Dirichlet distribution; a
regression predicts the held-out losses at their ends; the best of many simulated mixtures, by that
prediction, are averaged.  Some mixtures are held out first: the rank correlation of their predicted
and measured losses says how far to trust the regression.  The mixture itself comes from a fit to
all of them.  With --study the runs of an earlier sweep are read and nothing is run.

In --out: regmix.json (all of it), summary.md, report.html, mixture.yml for the next run, and, of
runs of its own, table.csv and table.parquet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.checkpoint.files import write_text
from megatron.errors import ConfigError
from megatron.experiments.bounds import make_bounds
from megatron.experiments.conduct import (
    add_study_arguments,
    base_of,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.designs import dirichlet
from megatron.experiments.earlier import read_plan
from megatron.experiments.fixed_mixtures import (
    add_draw_arguments,
    add_seeds_argument,
    how_it_ended,
    measured_tokens,
    named_points,
    plan_mixtures,
    prior_of,
)
from megatron.experiments.limits import (
    add_aim_arguments,
    add_bound_arguments,
    asked_bounds,
    objective,
)
from megatron.experiments.proxies import Proxies, read_proxies, unseen_count
from megatron.experiments.regmix import Search, search, search_facts
from megatron.experiments.regmix_text import failure_text, search_text
from megatron.experiments.regression import BEST, SIMULATED, Regressor
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.study import Base, Study
from megatron.experiments.table import Row, read_table, write_table
from megatron.training.product import write_mixture

NAME = "regmix"
DEFAULT_OUT = "runs/studies/regmix"
PER_DOMAIN = 16
_OF_RUNS: Final[Mapping[str, Any]] = {
    "conf_file": [],
    "conf_dir": None,
    "overrides": [],
    "proxies": None,
    "seeds": None,
    "runs": None,
    "dry_run": False,
    "jobs": 1,
    "retries": 1,
    "rate": None,
    "command": None,
    "slurm": False,
    "time": None,
    "partition": None,
    "sbatch_args": None,
}
"""What only says how runs are run, with the defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    add_study_arguments(parser, out=DEFAULT_OUT)
    parser.set_defaults(out=None)
    which = parser.add_argument_group("the proxies")
    which.add_argument(
        "--study",
        type=Path,
        metavar="DIR",
        help="read the runs of this study (its --out) and run nothing; results go into 'regmix' "
        "inside it",
    )
    which.add_argument(
        "--proxies",
        type=int,
        metavar="N",
        help=f"mixtures that are trained on (default: {PER_DOMAIN} per domain; the paper: 512)",
    )
    add_seeds_argument(which)
    add_draw_arguments(which)
    own = parser.add_argument_group("the mixture that is looked for")
    add_bound_arguments(own)
    add_aim_arguments(own)
    own.add_argument(
        "--regressor",
        nargs="+",
        choices=[str(one) for one in Regressor],
        default=[str(one) for one in Regressor],
        help="how losses are predicted; of several the one that ranks the mixtures held out best "
        "finds the mixture (default: all)",
    )
    own.add_argument(
        "--held-out",
        type=float,
        default=0.25,
        metavar="N",
        help="mixtures kept out of the fit that is ranked: a share below 1, or a number "
        "(default: 0.25)",
    )
    own.add_argument(
        "--simulated",
        type=int,
        default=SIMULATED,
        metavar="N",
        help=f"mixtures that are drawn and predicted (default: {SIMULATED})",
    )
    own.add_argument(
        "--best",
        type=int,
        default=BEST,
        metavar="N",
        help=f"how many of them are averaged (default: {BEST})",
    )


def run(options: argparse.Namespace) -> int:
    """Run the proxies, or read them, and find the mixture; return the exit code."""
    check_options(options)
    if options.study is not None:
        options.out = options.out or options.study / NAME
        plan = read_plan(options.study)
        sizes: dict[str, float] = plan["domain_tokens"]
        proxies = read_proxies(read_table(options.study), list(sizes))
        find(options, proxies, sizes, steps=int(plan["runs"][0]["steps"]))
        print(write_report(options.out, command=command_line(options)))
        return 0
    options.out = options.out or Path(DEFAULT_OUT)
    base = base_of(options)
    study = plan_proxies(options, base)
    outcome = conduct(study, options)
    if outcome is None:
        return 0
    if outcome.stopped is not None:
        return outcome.exit_code
    ended = how_it_ended(study, outcome)
    written = write_table(ended.rows, options.out)
    print("written: " + " ".join(map(str, written)))
    try:
        _find_in(options, study, ended.rows, ended.failed)
    finally:
        ended.tell()
    print(write_report(options.out, command=command_line(options), failed=ended.why))
    return outcome.exit_code


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and flags of runs where none are run.

    Raises:
        ConfigError: naming the flag.
    """
    if not 1 <= options.best <= options.simulated:
        raise ConfigError(
            f"--best is {options.best} of --simulated {options.simulated}; give a number from 1 "
            "to as many as are simulated"
        )
    if options.study is None:
        return
    given = [name for name, default in _OF_RUNS.items() if getattr(options, name) != default]
    if given:
        flags = {"conf_file": "a configuration file", "conf_dir": "-d", "overrides": "--set"}
        named = [flags.get(name, f"--{name.replace('_', '-')}") for name in given]
        raise ConfigError(
            f"--study reads runs that are there, and {', '.join(named)} is for new ones; leave out "
            "the one or the other"
        )


def plan_proxies(options: argparse.Namespace, base: Base) -> Study:
    """Plan the proxies that the command line asks for.

    Raises:
        ConfigError: numbers that cannot lead to a mixture, or a wrong configuration.
    """
    config = base.load()
    domains = tuple(config.trained)
    count = PER_DOMAIN * len(domains) if options.proxies is None else options.proxies
    if count < 1:
        raise ConfigError(f"--proxies is {count}; give a number from 1 on")
    unseen_count(options.held_out, count, len(domains))
    measured = tuple(config.domains)
    objective(options.objective, measured)
    tokens = measured_tokens(config, all_of=True)
    bounds = make_bounds(domains, floor=options.floor, ceiling=options.ceiling)
    mixtures = dirichlet(
        bounds,
        count=count,
        seed=options.design_seed,
        concentration=options.concentration,
        prior=prior_of(options, tokens),
    )
    study = plan_mixtures(
        base,
        named_points(np.asarray(mixtures), domains),
        options.seeds,
        runs_dir(options),
        name=NAME,
        gpus=gpus_of(options, base),
    )
    # A cap that no mixture can keep to is told of before days of runs, not after.
    asked_bounds(options, study.runs[0].domain_tokens, float(study.runs[0].tokens))
    return study


def _find_in(
    options: argparse.Namespace, study: Study, rows: Sequence[Row], failed: Sequence[str]
) -> None:
    """Find the mixture of a study's own runs, if enough of them are whole."""
    if failed:
        try:
            proxies = read_proxies(rows, study.domains) if rows else None
            whole = 0 if proxies is None else len(proxies.names)
            unseen_count(options.held_out, whole, len(study.domains))
        except ConfigError as error:
            write_text(options.out / "summary.md", failure_text(failed, str(error)))
            print(f"no mixture was found: {error}")
            return
    else:
        proxies = read_proxies(rows, study.domains)
    assert proxies is not None
    sizes = {name: float(count) for name, count in study.runs[0].domain_tokens.items()}
    find(options, proxies, sizes, steps=study.runs[0].steps, failed=failed)


def find(
    options: argparse.Namespace,
    proxies: Proxies,
    sizes: Mapping[str, float],
    *,
    steps: int,
    failed: Sequence[str] = (),
) -> None:
    """Find the mixture and write what is known of it.

    Args:
        options: of the command, ``out`` filled in.
        proxies: what was measured.
        sizes: training tokens that there are of each domain.
        steps: of the proxies.
        failed: runs that failed, each with the reason.

    Raises:
        ConfigError: too few mixtures, or an option is wrong.
    """
    asked = Search(
        regressors=tuple(Regressor(name) for name in dict.fromkeys(options.regressor)),
        bounds=asked_bounds(options, sizes, proxies.tokens),
        weights=objective(options.objective, proxies.measured),
        unseen=unseen_count(options.held_out, len(proxies.names), len(proxies.domains)),
        simulated=options.simulated,
        best=options.best,
        seed=options.design_seed,
        concentration=options.concentration,
        prior=prior_of(options, list(sizes.values())),
    )
    found = search(proxies, asked)
    facts = search_facts(proxies, asked, found) | {"failed": list(failed)}
    out: Path = options.out
    text = search_text(facts, failed)
    written = [
        write_text(out / "regmix.json", json.dumps(facts, indent=1, ensure_ascii=False)),
        write_text(out / "summary.md", text),
    ]
    method = f"RegMix ({found.regressor}) over {len(proxies.names)} mixtures"
    path = write_mixture(
        out, proxies.domains, lambda: found.simulated.mixture, method=method, step=steps
    )
    assert path is not None
    print(text, end="")
    print("written: " + " ".join(map(str, [*written, path])))
