"""Carries a comparison out: one stage of all chains after the other, so that no slot is idle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import NeomixError
from megatron.experiments.compare.contestants import Chain, sweep_points
from megatron.experiments.compare.league import Entry, League, StageStudy, plan_stage
from megatron.experiments.compare.study_parts import ORACLE, Task
from megatron.experiments.execute import Outcome
from megatron.experiments.study import PlannedRun, Variant
from megatron.experiments.table import run_rows

Conduct = Callable[[StageStudy], Outcome | None]


@dataclass(frozen=True, kw_only=True)
class OraclePoint:
    """A mixture of the oracle's sweep.

    Attributes:
        weights: by domain.
        by_seed: average measured loss by seed; a run that failed is missing.
    """

    weights: Mapping[str, float]
    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over seeds; NaN if every run failed."""
        return float(np.mean(list(self.by_seed.values()))) if self.by_seed else math.nan


@dataclass(kw_only=True)
class Played:
    """What became of the runs.

    Attributes:
        runs: all that were asked for, in their order.
        finals: the run that counts, by task, method (or oracle) and seed.
        chains: all finished runs of a chain with their roles, by the same key.
        missing: why a chain has no run that counts, by the same key.
        failed: lines about runs that failed.
        sweeps: the oracle's sweep, by task.
        exit_code: of the command.
        halted: whether it ended before all was done, because somebody stopped it, or an array
            job is to be submitted first.
    """

    runs: list[PlannedRun] = field(default_factory=list)
    finals: dict[tuple[str, str, int], PlannedRun] = field(default_factory=dict)
    chains: dict[tuple[str, str, int], list[tuple[str, PlannedRun]]] = field(default_factory=dict)
    missing: dict[tuple[str, str, int], str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    sweeps: dict[str, list[OraclePoint]] = field(default_factory=dict)
    exit_code: int = 0
    halted: bool = False


@dataclass(kw_only=True)
class _Live:
    """A chain in play: what it asked for last."""

    key: tuple[str, str, int]
    task: Task
    chain: Any
    names: list[str] = field(default_factory=list)


def play(
    league: League,
    runs_dir: Path,
    conduct: Conduct,
    *,
    gpus: int = 0,
    say: Callable[[str], None] = print,
) -> Played:
    """Bring every chain to its end.

    Args:
        league: who takes part.
        runs_dir: folder of the runs' folders.
        conduct: shows and carries out one stage.
        gpus: CUDA devices of a machine that a run starts on.
        say: takes lines for the user.
    """
    return _Player(league, runs_dir, conduct, gpus, say).play()


class _Player:
    def __init__(
        self,
        league: League,
        runs_dir: Path,
        conduct: Conduct,
        gpus: int,
        say: Callable[[str], None],
    ) -> None:
        self._league, self._runs_dir, self._conduct = league, runs_dir, conduct
        self._gpus, self._say = gpus, say
        self._played = Played()
        self._live: list[tuple[_Live, list[tuple[Task, Variant, str]]]] = []

    def play(self) -> Played:
        for entry in self._league.entries:
            for seed in entry.task.seeds:
                self._advance(self._entered(entry, seed), None)
        if self._league.file.oracle is not None:
            for task in self._league.file.tasks:
                self._advance(self._oracle(task), None)
        while self._live:
            if not self._stage():
                self._played.halted = True
                break
        return self._played

    def _entered(self, entry: Entry, seed: int) -> _Live:
        def chain() -> Any:
            inner: Chain = entry.contestant.chain(seed)
            wanted = next(inner)
            while True:
                runs = yield [
                    (entry.task, self._league.variant(entry, one, seed), one.role) for one in wanted
                ]
                try:
                    wanted = inner.send(runs)
                except StopIteration:
                    return

        return _Live(key=(entry.task.name, entry.method.name, seed), task=entry.task, chain=chain())

    def _oracle(self, task: Task) -> _Live:
        """Return the oracle's chain: its sweep, then the best mixture with the test seeds."""
        oracle = self._league.file.oracle
        assert oracle is not None

        def chain() -> Any:
            points = sweep_points(oracle.sweep, self._league.domains[task.name], seed=0)
            asked = [(number, seed) for number in range(len(points)) for seed in oracle.seeds]
            runs = yield [
                (task, self._league.oracle_variant(task, points[number], seed, number), "point")
                for number, seed in asked
            ]
            losses: list[dict[int, float]] = [{} for _ in points]
            for (number, seed), run in zip(asked, runs, strict=True):
                if run is not None:
                    losses[number][seed] = average_loss(run, self._league.file.measure)
            sweep = [
                OraclePoint(weights=point, by_seed=mine)
                for point, mine in zip(points, losses, strict=True)
            ]
            self._played.sweeps[task.name] = sweep
            whole = [point for point in sweep if len(point.by_seed) == len(oracle.seeds)]
            if not whole:
                return
            best = min(whole, key=lambda point: (np.isnan(point.mean), point.mean))
            yield [
                (task, self._league.oracle_variant(task, best.weights, seed, None), "final")
                for seed in task.seeds
            ]

        return _Live(key=(task.name, ORACLE, -1), task=task, chain=chain())

    def _advance(self, live: _Live, runs: list[PlannedRun | None] | None) -> None:
        """Let a chain say what comes next."""
        try:
            asked = next(live.chain) if runs is None else live.chain.send(runs)
        except StopIteration:
            return
        except NeomixError as error:
            self._give_up(live, str(error))
            return
        self._live.append((live, asked))

    def _give_up(self, live: _Live, why: str) -> None:
        task, method, seed = live.key
        self._played.missing[live.key] = why
        which = "" if method == ORACLE else f", seed {seed}"
        self._say(f"task '{task}', method '{method}'{which}: {why}")
        self._played.exit_code = self._played.exit_code or 1

    def _stage(self) -> bool:
        """Do what all chains ask for now; return False if the command is to end."""
        live, self._live = self._live, []
        variants = [(task, variant) for _, asked in live for task, variant, _ in asked]
        study = plan_stage(
            self._league, variants, self._runs_dir, self._played.runs, gpus=self._gpus
        )
        self._played.runs += study.runs
        outcome = self._conduct(study)
        if outcome is None or outcome.stopped is not None:
            self._played.exit_code = 0 if outcome is None else outcome.exit_code
            return False
        self._played.exit_code = self._played.exit_code or outcome.exit_code
        why = {failure.run.key: failure.why for failure in outcome.failed}
        by_name = {run.name: run for run in study.runs}
        for one, asked in live:
            runs = [by_name[variant.name] for _, variant, _ in asked]
            self._hand_back(one, runs, [role for _, _, role in asked], why)
        return True

    def _hand_back(
        self, live: _Live, runs: list[PlannedRun], roles: list[str], why: Mapping[str, str]
    ) -> None:
        """Note what a chain's runs came to, and let it go on."""
        task, method, seed = live.key
        lost = [run for run in runs if run.key in why]
        self._played.failed += [f"{run.name}: {why[run.key]}" for run in lost]
        for run, role in zip(runs, roles, strict=True):
            key = (task, method, run.seed if method == ORACLE else seed)
            if run.key in why:
                if role == "final":
                    self._played.missing[key] = f"run '{run.name}' failed: {why[run.key]}"
                continue
            self._played.chains.setdefault(key, []).append((role, run))
            if role == "final":
                self._played.finals[key] = run
        if method == ORACLE:
            self._advance(live, [None if run.key in why else run for run in runs])
        elif lost:
            self._played.missing[live.key] = f"run '{lost[0].name}' failed: {why[lost[0].key]}"
        else:
            self._advance(live, list(runs))


def average_loss(run: PlannedRun, split: str) -> float:
    """Return the plain mean over domains of a run's held-out losses at its end; NaN: none."""
    losses = [row["loss"] for row in run_rows("", run) if row["last"] and row["split"] == split]
    return float(np.mean(losses)) if losses else math.nan
