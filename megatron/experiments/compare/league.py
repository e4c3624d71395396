"""The runs of a comparison: who takes part, how long every run is, and which runs come next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.config import Config, resolve_batch
from megatron.errors import ConfigError
from megatron.experiments.compare.blocks import Block, run_overrides, static, uncharged
from megatron.experiments.compare.budget import (
    LegSpec,
    MethodPlan,
    Priced,
    plan_method,
    pricing,
)
from megatron.experiments.compare.contestants import Contestant, Wanted
from megatron.experiments.compare.study_parts import ORACLE, Method, StudyFile, Task
from megatron.experiments.study import (
    PLAN,
    PlannedRun,
    Study,
    Variant,
    distinct,
    plan_study,
    ranks_of,
)
from megatron.training.domains import OpenDomains, open_run_domains
from megatron.training.layout import run_layout


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method on a task.

    Attributes:
        task: the task.
        contestant: the method, ready for the task.
        plan: how long its runs are.
        uncharged: options that hold what earlier work has found, for which nobody pays.
    """

    task: Task
    contestant: Contestant
    plan: MethodPlan
    uncharged: tuple[str, ...]

    @property
    def method(self) -> Method:
        """The method."""
        return self.contestant.method


@dataclass(frozen=True, kw_only=True)
class League:
    """Everything of a comparison that is settled before a run starts.

    Attributes:
        file: the study.
        entries: every method on every task, tasks together.
        configs: configuration of each task.
        budgets: FLOPs of the baseline's run, by task.
        domains: names of what each task trains on, by task.
    """

    file: StudyFile
    entries: tuple[Entry, ...]
    configs: Mapping[str, Config]
    budgets: Mapping[str, float]
    domains: Mapping[str, tuple[str, ...]]

    def entry(self, task: str, method: str) -> Entry:
        """Return a method on a task."""
        return next(e for e in self.entries if e.task.name == task and e.method.name == method)

    def variant(self, entry: Entry, wanted: Wanted, seed: int) -> Variant:
        """Return a run that a chain asks for, as part of a study."""
        method, task, role = entry.method, entry.task, wanted.role
        final = role == entry.plan.final.role
        leg = entry.plan.leg(role)
        tail = f"-{wanted.number:0{len(str(leg.count - 1))}d}" if leg.count > 1 else ""
        return Variant(
            name=f"{task.name}-{method.name}-seed-{seed}{'' if final else f'-{role}{tail}'}",
            overrides=run_overrides(
                self.configs[task.name],
                wanted.block,
                steps=leg.steps,
                seed=seed,
                more=_more(entry.contestant, final=final),
            ),
            tags={
                "task": task.name,
                "contestant": method.name,
                "role": role,
                "number": wanted.number,
            },
        )

    def oracle_variant(
        self, task: Task, weights: Mapping[str, float], seed: int, point: int | None
    ) -> Variant:
        """Return a run of the oracle: a point of its sweep, or (None) its best mixture anew."""
        config = self.configs[task.name]
        tail = "" if point is None else f"-point-{point:03d}"
        return Variant(
            name=f"{task.name}-{ORACLE}-seed-{seed}{tail}",
            overrides=run_overrides(
                config,
                static(weights),
                steps=config.training.train_iters,
                seed=seed,
                more=self.file.method(self.file.baseline).overrides,
            ),
            tags={
                "task": task.name,
                "contestant": ORACLE,
                "role": "final" if point is None else "point",
                "number": point or 0,
            },
        )


def form_league(file: StudyFile, *, gpus: int = 0) -> League:
    """Settle how long every run is.

    Args:
        file: the study.
        gpus: CUDA devices of a machine that a run starts on.

    Raises:
        ConfigError: data for the measurement is missing, or a budget does not reach.
        NeomixError: a task's configuration or data is wrong.
    """
    entries: list[Entry] = []
    configs, budgets, names = {}, {}, {}
    for task in file.tasks:
        config = configs[task.name] = task.base.load()
        domains = open_run_domains(config)
        try:
            _check_measured(file, task, config, domains, gpus)
            names[task.name] = domains.names
            teller = _Teller(file, task, config, domains, gpus)
            budgets[task.name] = teller.budget
            entries += [teller.entry(method) for method in file.methods]
        finally:
            domains.close()
    return League(
        file=file, entries=tuple(entries), configs=configs, budgets=budgets, domains=names
    )


class _Teller:
    """Works out the entries of one task."""

    def __init__(
        self, file: StudyFile, task: Task, config: Config, domains: OpenDomains, gpus: int
    ) -> None:
        self._file, self._task, self._config = file, task, config
        self._domains, self._gpus = domains, gpus
        self._known: dict[str, Priced] = {}
        self._steps = config.training.train_iters
        base = file.method(file.baseline)
        priced = self._priced(base.mixing, base.overrides)(self._steps)
        self.budget = priced.charges(self._steps).total

    def entry(self, method: Method) -> Entry:
        """Return a method's entry.

        Raises:
            ConfigError: the method does not fit the task.
        """
        try:
            return self._entry(method)
        except ConfigError as error:
            raise ConfigError(
                f"{self._file.path}: task '{self._task.name}', method '{method.name}': {error}"
            ) from None

    def _entry(self, method: Method) -> Entry:
        prior = None if method.prior is None else self._file.method(method.prior)
        contestant = Contestant(method=method, prior=prior, domains=self._domains.names)
        more = _more(contestant, final=False)
        plan = plan_method(
            [
                LegSpec(role=leg.role, count=leg.count, priced=self._priced(leg.block, more))
                for leg in contestant.search
            ],
            self._priced(contestant.final, method.overrides),
            steps=self._steps,
            budget=self.budget,
            rule=self._file.budget,
            share=contestant.searcher.share,
        )
        return Entry(
            task=self._task,
            contestant=contestant,
            plan=plan,
            uncharged=tuple(uncharged(method.mixing)),
        )

    def _priced(self, block: Block, more: Sequence[str]) -> Priced:
        key = json.dumps([dict(block), list(more)], sort_keys=True)
        if key not in self._known:
            self._known[key] = pricing(
                lambda steps: self._task.base.load(
                    run_overrides(self._config, block, steps=steps, seed=None, more=more)
                ),
                self._domains,
                self._gpus,
            )
        return self._known[key]


def _more(contestant: Contestant, *, final: bool) -> tuple[str, ...]:
    """Return the settings of a method's runs beyond the task's."""
    if final:
        return contestant.method.overrides
    return (*contestant.searcher.overrides, *contestant.searcher.proxy_overrides)


def _check_measured(
    file: StudyFile, task: Task, config: Config, domains: OpenDomains, gpus: int
) -> None:
    """Refuse a task whose results nobody could measure."""
    parts = domains.test if file.measure == "test" else domains.valid
    where = f"{file.path}: task '{task.name}'"
    for name, part in zip(domains.measured, parts, strict=True):
        if part is None:
            remedy = "" if file.measure == "valid" else ", or set measure: valid in the study file"
            raise ConfigError(
                f"{where}: domain '{name}' has no {file.measure} data; give it `{file.measure}`, "
                f"or a split with a share for it{remedy}"
            )
    total = resolve_batch(config.batch, run_layout(config, ranks_of(config, gpus)).data_size)[2]
    part_name: Any = file.measure
    if config.training.validation_samples(total, part_name) < 1:
        raise ConfigError(f"{where}: eval_iters is 0, so that nothing is measured; raise it")
    for name in task.entropies:
        if name not in domains.measured:
            raise ConfigError(f"{where}: entropies names '{name}', which is no domain of it")
    if missing := set(domains.measured) - set(task.entropies) if task.entropies else set():
        raise ConfigError(
            f"{where}: entropies lacks {', '.join(sorted(missing))}; name all or none"
        )


@dataclass(frozen=True, kw_only=True)
class StageStudy(Study):
    """One stage of a comparison, which writes the plan of all of it.

    Attributes:
        league: the comparison.
        before: runs of earlier stages.
    """

    league: League = field(repr=False)
    before: tuple[PlannedRun, ...] = ()

    def write_plan(self, out: Path) -> Path:
        """Write ``plan.json``: the budgets, and every run that is known so far."""
        return write_plan(self.league, (*self.before, *self.runs), out)


def write_plan(league: League, runs: Sequence[PlannedRun], out: Path) -> Path:
    """Write ``plan.json``, and return its path.

    Raises:
        RunError: the disk refuses.
    """
    path = out / PLAN
    plan: dict[str, Any] = {
        "study": league.file.name,
        "baseline": league.file.baseline,
        "setting": league.file.budget.setting,
        "budgets": dict(league.budgets),
        "methods": [method_facts(entry) for entry in league.entries],
        "runs": [run_facts(run) for run in distinct(runs)],
    }
    with disk_errors(path):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(plan, indent=1, ensure_ascii=False).encode())
    return path


def method_facts(entry: Entry) -> dict[str, Any]:
    """Return what is planned for a method on a task, JSON-able."""
    return {
        "task": entry.task.name,
        "method": entry.method.name,
        "budget": entry.plan.budget,
        "planned": vars(entry.plan.charges) | {"total": entry.plan.charges.total},
        "legs": [
            {"role": leg.role, "runs": leg.count, "steps": leg.steps, "flops": leg.charges.total}
            for leg in (*entry.plan.search, entry.plan.final)
        ],
        "uncharged": list(entry.uncharged),
    }


def run_facts(run: PlannedRun) -> dict[str, Any]:
    """Return what is planned of a run, JSON-able."""
    return {
        "run": run.name,
        "key": run.key,
        "folder": str(run.folder),
        "method": run.method,
        "seed": run.seed,
        "tags": dict(run.tags),
        "weights": dict(run.weights),
        "steps": run.steps,
        "tokens": run.tokens,
        "flops": run.flops,
    }


def plan_stage(
    league: League,
    variants: Iterable[tuple[Task, Variant]],
    runs_dir: Path,
    before: Sequence[PlannedRun],
    *,
    gpus: int,
) -> StageStudy:
    """Plan the runs of one stage of all chains.

    Raises:
        NeomixError: what a run would stop at when it starts.
    """
    by_task: dict[str, list[Variant]] = {}
    for task, variant in variants:
        by_task.setdefault(task.name, []).append(variant)
    bases = {task.name: task.base for task in league.file.tasks}
    runs = [
        run
        for task, chosen in by_task.items()
        for run in plan_study(league.file.name, bases[task], chosen, runs_dir, gpus=gpus).runs
    ]
    return StageStudy(name=league.file.name, runs=tuple(runs), league=league, before=tuple(before))
