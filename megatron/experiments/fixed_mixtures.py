"""Studies whose runs train on fixed mixtures: their flags, their plan, and how they ended."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.execute import Outcome
from megatron.experiments.study import (
    Base,
    PlannedRun,
    Study,
    Variant,
    plan_study,
    static_overrides,
)
from megatron.experiments.table import Row, study_rows
from megatron.training.domains import open_run_domains

PRIORS = ("uniform", "natural")


def add_seeds_argument(parser: argparse._ActionsContainer) -> None:
    """Add the seeds that every mixture is trained with."""
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="seeds that every mixture is trained with (default: that of the configuration)",
    )


def add_draw_arguments(parser: argparse._ActionsContainer) -> None:
    """Add what says how mixtures are drawn at random."""
    parser.add_argument(
        "--design-seed", type=int, default=0, metavar="SEED", help="of the random mixtures"
    )
    parser.add_argument(
        "--concentration",
        type=float,
        default=1.0,
        metavar="A",
        help="of the random mixtures: 1 is uniform on the simplex, more favours its centre",
    )
    parser.add_argument(
        "--prior",
        choices=PRIORS,
        default="uniform",
        help="centre of the random mixtures: all domains alike, or by their tokens (natural)",
    )


def prior_of(options: argparse.Namespace, tokens: Sequence[float]) -> FloatArray | None:
    """Return the centre of the random mixtures, [K]; None: all domains alike.

    Args:
        options: with ``--prior``.
        tokens: training tokens that there are of each domain.
    """
    return np.asarray(tokens, dtype=np.float64) if options.prior == "natural" else None


def measured_tokens(config: Config, *, all_of: bool) -> list[float]:
    """Return the training tokens of each domain after a look whether losses can be measured.

    Args:
        config: of the study's runs.
        all_of: every domain needs a held-out loss, not only one of them.

    Raises:
        ConfigError: no held-out losses would be measured.
        DataError: the data cannot be opened.
    """
    if config.training.eval_iters == 0:
        raise ConfigError(
            "eval_iters is 0, so that no held-out loss is measured and mixtures cannot be "
            "compared; set it to 1 or more"
        )
    domains = open_run_domains(config)
    try:
        parts = zip(domains.measured, domains.valid, strict=True)
        blind = [name for name, part in parts if part is None]
        if blind and (all_of or len(blind) == len(domains.measured)):
            raise ConfigError(
                f"{', '.join(blind)} has no validation data, and every mixture is judged by "
                "held-out losses; give the domain a `valid`, or a split with a share for it"
            )
        return [float(count) for count in domains.token_counts]
    finally:
        domains.close()


def named_points(mixtures: FloatArray, domains: Sequence[str]) -> list[dict[str, float]]:
    """Return mixtures [N, K] by domain."""
    return [dict(zip(domains, map(float, row), strict=True)) for row in mixtures]


def plan_mixtures(
    base: Base,
    points: Sequence[Mapping[str, float]],
    seeds: Sequence[int] | None,
    folder: Path,
    *,
    name: str,
    gpus: int = 0,
) -> Study:
    """Plan a run for every mixture and seed.

    Args:
        base: what all runs share.
        points: mixtures, by domain.
        seeds: of the runs; the configuration's own if None.
        folder: of the runs' folders.
        name: of the study.
        gpus: CUDA devices of a machine that a run starts on.

    Raises:
        ConfigError: a seed is given twice, or the configuration is wrong.
    """
    config = base.load()
    chosen = list(seeds or [config.training.seed])
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"--seeds {' '.join(map(str, chosen))}: give each once")
    width = len(str(len(points) - 1))
    variants = [
        Variant(
            name=f"point-{index:0{width}d}-seed-{seed}",
            overrides=(*static_overrides(config, weights), f"seed={seed}"),
            tags={"point": index},
        )
        for index, weights in enumerate(points)
        for seed in chosen
    ]
    return plan_study(name, base, variants, folder, gpus=gpus)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What the runs of a study came to.

    Attributes:
        finished: came to their end, in the study's order.
        rows: the table of these.
        broken: the points of which a run failed.
        why: why runs failed, by name.
    """

    finished: tuple[PlannedRun, ...]
    rows: list[Row]
    broken: frozenset[int]
    why: Mapping[str, str]

    @property
    def failed(self) -> tuple[str, ...]:
        """A line for every failed run."""
        return tuple(f"{name}: {why}" for name, why in self.why.items())

    def tell(self) -> None:
        """Print which runs failed, and what to do about it."""
        for line in self.failed:
            print(f"failed: {line}")
        if self.failed:
            print("give the same command again to try the failed runs once more")


def how_it_ended(study: Study, outcome: Outcome) -> Ended:
    """Return what the runs of a study came to.

    Raises:
        RunError: a finished run's files are missing or damaged.
    """
    done = {run.key for run in outcome.finished}
    why = {failure.run.key: failure.why for failure in outcome.failed}
    finished = tuple(run for run in study.runs if run.key in done)
    lost = [run for run in study.runs if run.key in why]
    return Ended(
        finished=finished,
        rows=study_rows(study.name, finished),
        broken=frozenset(int(run.tags["point"]) for run in lost),
        why={run.name: why[run.key] for run in lost},
    )
