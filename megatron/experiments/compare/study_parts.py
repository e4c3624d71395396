"""What is compared: tasks, methods, the rule of the budget and the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from megatron.errors import ConfigError, did_you_mean
from megatron.experiments.study import Base

ORACLE: Final = "oracle"
SHARE: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a method may spend.

    Attributes:
        setting: ``equal``: the run that counts and everything before and beside it cost what
            the baseline's run costs.  ``restricted`` and ``unrestricted``, after the Aioli
            paper (arXiv 2411.05735): the run that counts has the baseline's steps, and what
            was learnt before it comes on top, within ``extra``.
        extra: most training before the run that counts, in baseline runs; not for ``equal``.
    """

    setting: str = "equal"
    extra: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Mixtures to try.

    Attributes:
        design: how they are chosen.
        points: how many; for a grid, parts that an edge has.
        floor: least weight of a domain.
        ceiling: greatest weight of a domain.
    """

    design: str
    points: int
    floor: float = 0.0
    ceiling: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The sweep whose best mixture says what a fixed mixture could have reached.

    Attributes:
        sweep: the mixtures.
        seeds: that choose; they differ from the test seeds.
    """

    sweep: Sweep
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of domains, a model and a length of training.

    Attributes:
        name: of the task.
        base: its configuration.
        kind: whether there is room above the baseline, as far as is known, or none.
        seeds: paired test seeds.
        entropies: known floors of domains' losses, nats per token.
    """

    name: str
    base: Base
    kind: str
    seeds: tuple[int, ...]
    entropies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A contestant.

    Attributes:
        name: of the contestant.
        mixing: the configuration's ``mixing:`` block of the method.
        overrides: further settings of its runs, as ``key=value``.
        stages: what is done before the run that counts.
        share: of the budget that goes into that; see :class:`Budget`.
        sweep: mixtures of ``stages: sweep``.
        fit: what makes a mixture of that sweep's losses.
        proxy_overrides: further settings of the runs before the one that counts.
        prior: another method, whose mixture the run that counts starts from.
    """

    name: str
    mixing: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    stages: str = "none"
    share: float = SHARE
    sweep: Sweep | None = None
    fit: str = "best"
    proxy_overrides: tuple[str, ...] = ()
    prior: str | None = None


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """All that a study compares.

    Attributes:
        name: of the study.
        path: of the file.
        tasks: in their order.
        methods: in their order, the baseline among them.
        label: a sentence that stands over its results.
        donors: methods that do not take part, and whose mixture another one starts from.
        baseline: name of the method that all others are compared with.
        budget: see :class:`Budget`.
        oracle: see :class:`Oracle`; None: no regret.
        measure: which held-out part is compared.
        confidence: of the intervals.
    """

    name: str
    path: Path
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    baseline: str
    budget: Budget
    oracle: Oracle | None
    measure: str
    confidence: float
    label: str = ""
    donors: tuple[Method, ...] = ()

    def method(self, name: str) -> Method:
        """Return a method by its name."""
        return next(one for one in (*self.methods, *self.donors) if one.name == name)

    def only(
        self,
        *,
        tasks: Iterable[str] | None,
        methods: Iterable[str] | None,
        seeds: Iterable[int] | None,
    ) -> StudyFile:
        """Return the part that a command line asks for; the baseline always stays.

        Raises:
            ConfigError: an unknown name, or seeds that a task does not have.
        """
        kept_tasks = _chosen("--tasks", self.tasks, tasks)
        kept = _chosen("--methods", self.methods, methods)
        if seeds is not None:
            wanted = tuple(seeds)
            for task in kept_tasks:
                if strange := [seed for seed in wanted if seed not in task.seeds]:
                    raise ConfigError(
                        f"--seeds {strange[0]}: task '{task.name}' has {_list(task.seeds)}"
                    )
            kept_tasks = tuple(replace(task, seeds=wanted) for task in kept_tasks)
        names = {method.name for method in kept} | {self.baseline}
        priors = {method.prior for method in kept} - names
        return replace(
            self,
            tasks=kept_tasks,
            methods=tuple(method for method in self.methods if method.name in names),
            donors=tuple(method for method in self.methods if method.name in priors),
        )


def _chosen(flag: str, known: tuple[Any, ...], wanted: Iterable[str] | None) -> tuple[Any, ...]:
    if wanted is None:
        return known
    names = [one.name for one in known]
    for name in (wanted := list(wanted)):
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"{flag}: there is no '{name}' in the study file{hint}")
    return tuple(one for one in known if one.name in wanted)


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
