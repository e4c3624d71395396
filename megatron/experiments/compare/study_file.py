"""What is compared: the file of ``tools/mix.py compare``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from megatron.errors import ConfigError, did_you_mean
from megatron.experiments.compare.fields import Block, read_block
from megatron.experiments.study import Base
from megatron.registry import mixing_methods

STAGES: Final = ("none", "doremi", "proxy", "skillit", "sweep")
FITS: Final = ("best", "regmix", "regmix_linear", "law")
DESIGNS: Final = ("grid", "dirichlet", "spread")
SETTINGS: Final = ("equal", "restricted", "unrestricted")
KINDS: Final = ("room", "control")
MEASURES: Final = ("test", "valid")
ORACLE: Final = "oracle"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHARE: Final = 0.5


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
    share: float = _SHARE
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

    def method(self, name: str) -> Method:
        """Return a method by its name."""
        return next(method for method in self.methods if method.name == name)

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
        needed = {self.baseline, *(method.prior for method in kept)}
        names = {method.name for method in kept} | {self.baseline}
        if missing := needed - names - {None}:
            raise ConfigError(
                f"--methods leaves out {sorted(map(str, missing))[0]}, which another "
                "method takes its mixture from; add it"
            )
        if seeds is not None:
            wanted = tuple(seeds)
            for task in kept_tasks:
                if strange := [seed for seed in wanted if seed not in task.seeds]:
                    raise ConfigError(
                        f"--seeds {strange[0]}: task '{task.name}' has {_list(task.seeds)}"
                    )
            kept_tasks = tuple(replace(task, seeds=wanted) for task in kept_tasks)
        chosen = tuple(method for method in self.methods if method.name in names)
        return replace(self, tasks=kept_tasks, methods=chosen)


def read_study_file(path: Path, overrides: Iterable[str] = ()) -> StudyFile:
    """Read a study file.

    Args:
        path: of the file; configuration files are named from its folder.
        overrides: ``key=value`` texts for the runs of all tasks, over their own.

    Raises:
        ConfigError: what is wrong, with file and key.
    """
    whole = read_block(path)
    whole.only(
        "name",
        "tasks",
        "seeds",
        "set",
        "baseline",
        "methods",
        "oracle",
        "budget",
        "measure",
        "confidence",
    )
    methods = _methods(whole)
    baseline = whole.text("baseline", "uniform")
    names = [method.name for method in methods]
    if baseline not in names:
        hint = did_you_mean(baseline, names)
        raise whole.wrong("baseline", f"is '{baseline}', which is none of the methods{hint}")
    if next(m for m in methods if m.name == baseline).stages != "none":
        raise whole.wrong("baseline", f"'{baseline}' has stages; the baseline is one plain run")
    common = settings(whole, "set")
    tasks = tuple(_task(whole, name, common, tuple(overrides)) for name in _names(whole, "tasks"))
    oracle = _oracle(whole)
    for task in tasks:
        if oracle is not None and (both := set(oracle.seeds) & set(task.seeds)):
            raise whole.wrong(
                "oracle.seeds",
                f"{min(both)} is a test seed of '{task.name}'; the "
                "best of many is chosen with seeds of its own",
            )
    return StudyFile(
        name=whole.text("name", path.stem),
        path=path,
        tasks=tasks,
        methods=methods,
        baseline=baseline,
        budget=_budget(whole),
        oracle=oracle,
        measure=whole.choice("measure", MEASURES, "test"),
        confidence=whole.number("confidence", 0.95, lambda c: 0 < c < 1, "between 0 and 1"),
    )


def settings(block: Block, key: str) -> tuple[str, ...]:
    """Return a block of settings as ``key=value`` texts."""
    given = block.block(key)
    return tuple(f"{name}={json.dumps(value)}" for name, value in given.content.items())


def _names(whole: Block, key: str) -> list[str]:
    names = list(whole.block(key, required=True).content)
    if not names:
        raise whole.wrong(key, "is empty; name at least one")
    for name in names:
        if not _NAME.fullmatch(name):
            raise whole.wrong(f"{key}.{name}", "names are made of letters, digits, '_', '-', '.'")
    return names


def _task(whole: Block, name: str, common: tuple[str, ...], last: tuple[str, ...]) -> Task:
    block = whole.block("tasks").block(name)
    block.only("configs", "conf_dir", "set", "kind", "seeds", "entropies")
    seeds = block.seeds("seeds", whole.seeds("seeds"))
    if not seeds:
        raise block.wrong("seeds", "there are none; give them here or for all tasks")
    folder = whole.file.absolute().parent / block.text("conf_dir", ".")
    entropies = block.block("entropies")
    return Task(
        name=name,
        base=Base(
            files=block.texts("configs"),
            conf_dir=str(folder),
            overrides=(*common, *settings(block, "set"), *last),
        ),
        kind=block.choice("kind", KINDS, "room"),
        seeds=seeds,
        entropies={
            domain: entropies.number(domain, 0.0, lambda nats: nats >= 0, "at least 0 nats")
            for domain in entropies.content
        },
    )


def _methods(whole: Block) -> tuple[Method, ...]:
    methods = tuple(_method(whole, name) for name in _names(whole, "methods"))
    by_name = {method.name: method for method in methods}
    for method in methods:
        if method.prior is None:
            continue
        place = f"methods.{method.name}.prior"
        other = by_name.get(method.prior)
        if other is None:
            hint = did_you_mean(method.prior, by_name)
            raise whole.wrong(place, f"is '{method.prior}', which is none of the methods{hint}")
        if other.stages in ("none", "skillit") or other.prior:
            raise whole.wrong(
                place,
                f"'{other.name}' finds no mixture before its run; name a "
                "method with stages doremi, proxy or sweep",
            )
    return methods


def _method(whole: Block, name: str) -> Method:
    block = whole.block("methods").block(name)
    if name == ORACLE:
        raise whole.wrong(f"methods.{name}", "the name is taken by the study's oracle")
    stages = block.choice("stages", STAGES, "none")
    own = {"sweep": ("fit", "points", "design", "floor", "ceiling")}.get(stages, ())
    chained = ("share", "proxy_set") if stages != "none" else ("prior",)
    block.only("mixing", "set", "stages", *chained, *own)
    mixing = dict(block.block("mixing", required=stages != "sweep").content)
    known = sorted(mixing_methods)
    if stages == "sweep":
        mixing.setdefault("method", "static")
    chosen = mixing.get("method")
    if chosen not in known:
        hint = did_you_mean(str(chosen), known)
        raise block.wrong("mixing.method", f"is {chosen!r}, no mixing method{hint}")
    if stages in ("doremi", "skillit") and chosen != stages:
        raise block.wrong("mixing.method", f"is '{chosen}', and stages '{stages}' need '{stages}'")
    points = block.whole("points", 8, 1) if stages == "sweep" else 0
    return Method(
        name=name,
        mixing=mixing,
        overrides=settings(block, "set"),
        stages=stages,
        share=block.number("share", _SHARE, lambda share: 0 < share < 1, "between 0 and 1"),
        sweep=_sweep(block, points, "dirichlet") if stages == "sweep" else None,
        fit=block.choice("fit", FITS, "best"),
        proxy_overrides=settings(block, "proxy_set"),
        prior=block.text("prior") if block.has("prior") else None,
    )


def _sweep(block: Block, points: int, design: str) -> Sweep:
    return Sweep(
        design=block.choice("design", DESIGNS, design),
        points=points,
        floor=block.number("floor", 0.0, lambda p: 0 <= p < 1, "at least 0 and below 1"),
        ceiling=block.number("ceiling", 1.0, lambda p: 0 < p <= 1, "above 0 and at most 1"),
    )


def _oracle(whole: Block) -> Oracle | None:
    if not whole.has("oracle"):
        return None
    block = whole.block("oracle")
    block.only("design", "points", "seeds", "floor", "ceiling")
    seeds = block.seeds("seeds")
    if not seeds:
        raise block.wrong("seeds", "there are none; give seeds that are no test seeds")
    return Oracle(sweep=_sweep(block, block.whole("points", 6, 1), "grid"), seeds=seeds)


def _budget(whole: Block) -> Budget:
    block = whole.block("budget")
    block.only("setting", "extra")
    setting = block.choice("setting", SETTINGS, "equal")
    if setting == "equal":
        if block.has("extra"):
            raise block.wrong(
                "extra",
                "belongs to restricted and unrestricted: under 'equal' "
                "nothing comes on top; a method's share says what goes where",
            )
        return Budget()
    default = 0.5 if setting == "restricted" else 10.0
    return Budget(setting=setting, extra=block.number("extra", default, lambda e: e > 0, "above 0"))


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
