"""What each kind of contestant does before the run that counts, as chains of runs.

A chain is a generator: it yields the runs of its next stage and gets them back when they have
ended.  Its last yield is the run that counts.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray, make_bounds
from megatron.experiments.compare.blocks import Block, static, with_weights
from megatron.experiments.compare.budget import REFERENCE
from megatron.experiments.compare.study_parts import Method, Sweep
from megatron.experiments.designs import dirichlet, grid, well_spread
from megatron.experiments.found_mixture import read_mixture
from megatron.experiments.optimum import best_mixture
from megatron.experiments.regression import Regressor, best_simulated, fit_regression
from megatron.experiments.runs_array import RunsArray, runs_array
from megatron.experiments.skill_graph import Negative, skill_graph
from megatron.experiments.static_law import fit_static_law
from megatron.experiments.study import PlannedRun
from megatron.experiments.table import run_rows, study_rows
from megatron.mixing.base import Mixer
from megatron.registry import mixing_methods

FINAL: Final = "final"
PROXY: Final = "proxy"
ONE_HOT: Final = "one-hot"
POINT: Final = "point"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A run that a chain asks for.

    Attributes:
        role: see :class:`megatron.experiments.compare.budget.Leg`.
        block: of its mixture.
        number: among those of its role.
    """

    role: str
    block: Block
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class LegBlock:
    """Runs of one role, as far as their price goes.

    Attributes:
        role: of them.
        count: how many.
        block: of their mixture; weights and what a run before them finds may differ.
    """

    role: str
    count: int
    block: Block


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A method at work on one task.

    Attributes:
        method: the method.
        prior: the one whose mixture it starts from; None: none.
        domains: what the task trains on.
    """

    method: Method
    domains: tuple[str, ...]
    prior: Method | None = None
    _searcher: Method = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Settle whose runs come before the one that counts, and that a fit can be made of them.

        Raises:
            ConfigError: a sweep has too few points for its fit.
        """
        who = self.prior or self.method
        object.__setattr__(self, "_searcher", who)
        if who.sweep is None:
            return
        points = len(sweep_points(who.sweep, self.domains, seed=0))
        least = len(self.domains) + {"best": 1 - len(self.domains), "law": 2}.get(who.fit, 1)
        if points < least:
            raise ConfigError(
                f"a sweep of {points} points is too little for fit: {who.fit} and "
                f"{len(self.domains)} domains; raise points to {least} at least"
            )

    @property
    def searcher(self) -> Method:
        """The method whose runs come before the one that counts."""
        return self._searcher

    @property
    def search(self) -> list[LegBlock]:
        """The runs before the one that counts, for their price."""
        who = self._searcher
        weights = who.mixing.get("weights")
        if who.stages == "doremi":
            return [
                LegBlock(role=REFERENCE, count=1, block=static(weights)),
                LegBlock(role=PROXY, count=1, block=who.mixing),
            ]
        if who.stages == "proxy":
            return [LegBlock(role=PROXY, count=1, block=who.mixing)]
        if who.stages == "skillit":
            return [LegBlock(role=ONE_HOT, count=len(self.domains), block=static(None))]
        if who.sweep is not None:
            count = len(sweep_points(who.sweep, self.domains, seed=0))
            return [LegBlock(role=POINT, count=count, block=static(None))]
        return []

    @property
    def final(self) -> Block:
        """The run that counts, for its price."""
        static_end = self.method.stages in ("doremi", "proxy", "sweep")
        return static(None) if static_end else self.method.mixing

    def chain(self, seed: int) -> Chain:
        """Return the chain of one seed."""
        found = yield from self._find(seed)
        block = self.method.mixing
        if self.method.stages == "skillit":
            block = {**block, "graph": found}
        elif self.prior is not None:
            block = with_weights(block, found)
        elif found is not None:
            block = static(found)
        yield [Wanted(role=FINAL, block=block)]

    def _find(self, seed: int) -> Generator[list[Wanted], list[PlannedRun], Any]:
        """Do what comes before the run that counts; return what it takes from that."""
        who = self._searcher
        if who.stages == "doremi":
            first = Wanted(role=REFERENCE, block=static(who.mixing.get("weights")))
            (reference,) = yield [first]
            block = {**who.mixing, "reference": str(reference.folder)}
            (proxy,) = yield [Wanted(role=PROXY, block=block)]
            return read_mixture(proxy)
        if who.stages == "proxy":
            (proxy,) = yield [Wanted(role=PROXY, block=who.mixing)]
            return found_by(proxy)
        if who.stages == "skillit":
            runs = yield [
                Wanted(role=ONE_HOT, number=number, block=static(_alone(self.domains, name)))
                for number, name in enumerate(self.domains)
            ]
            by_domain = {
                (seed, name): run.name for name, run in zip(self.domains, runs, strict=True)
            }
            return skill_graph(study_rows("", runs), by_domain, Negative.KEEP).named()
        if who.sweep is not None:
            points = sweep_points(who.sweep, self.domains, seed=seed)
            runs = yield [
                Wanted(role=POINT, number=number, block=static(point))
                for number, point in enumerate(points)
            ]
            ends = runs_array(study_rows("", runs), self.domains)
            return fitted(ends, who.fit, who.sweep, seed=seed)
        return None


Chain = Generator[list[Wanted], list[PlannedRun], None]


def found_by(proxy: PlannedRun) -> dict[str, float]:
    """Return the mixture that a proxy speaks for.

    It is what its method leaves (``doge``), else the mean of what drew its steps.
    """
    build: Any = mixing_methods[proxy.method].build
    if getattr(build, "result", Mixer.result) is not Mixer.result:
        return read_mixture(proxy)
    last = next(row for row in run_rows("", proxy) if row["last"])
    return {name: float(weight) for name, weight in json.loads(last["weights"]).items()}


def sweep_points(sweep: Sweep, domains: tuple[str, ...], *, seed: int) -> list[dict[str, float]]:
    """Return the mixtures of a sweep.

    Args:
        sweep: the design.
        domains: what is trained on.
        seed: of a design that draws.
    """
    bounds = make_bounds(domains, floor=sweep.floor, ceiling=sweep.ceiling)
    if sweep.design == "grid":
        points = grid(bounds, parts=sweep.points)
    else:
        draw = dirichlet if sweep.design == "dirichlet" else well_spread
        points = draw(bounds, count=sweep.points, seed=seed)
    return [dict(zip(domains, map(float, row), strict=True)) for row in points]


def fitted(ends: RunsArray, fit: str, sweep: Sweep, *, seed: int) -> dict[str, float]:
    """Return the mixture that a sweep's losses speak for: all measured domains count alike.

    Args:
        ends: of the sweep's runs.
        fit: one of :data:`megatron.experiments.compare.study_file.FITS`.
        sweep: its bounds hold for the mixture too.
        seed: of what is random in the fit.
    """
    bounds = make_bounds(ends.domains, floor=sweep.floor, ceiling=sweep.ceiling)
    if fit == "best":
        means = ends.losses.mean(axis=1)
        finite = np.where(np.isfinite(means), means, np.inf)
        mixture: FloatArray = ends.mixtures[int(finite.argmin())]
    elif fit == "law":
        law = fit_static_law(ends.mixtures, ends.losses).law
        mixture = best_mixture(law, bounds, seed=seed).mixture
    else:
        kind = Regressor.LOG_LINEAR if fit == "regmix_linear" else Regressor.BOOSTING
        regression = fit_regression(ends.mixtures, ends.losses, regressor=kind, seed=seed)
        mixture = best_simulated(regression, bounds, seed=seed).mixture
    return dict(zip(ends.domains, map(float, mixture), strict=True))


def _alone(domains: tuple[str, ...], name: str) -> dict[str, float]:
    return {domain: float(domain == name) for domain in domains}
