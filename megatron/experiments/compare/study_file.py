"""The file of ``tools/mix.py compare``, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from megatron.errors import did_you_mean
from megatron.experiments.compare.fields import Block, read_block
from megatron.experiments.compare.study_parts import (
    ORACLE,
    SHARE,
    Budget,
    Method,
    Oracle,
    StudyFile,
    Sweep,
    Task,
)
from megatron.experiments.study import Base
from megatron.registry import mixing_methods

STAGES: Final = ("none", "doremi", "proxy", "skillit", "sweep")
FITS: Final = ("best", "regmix", "regmix_linear", "law")
DESIGNS: Final = ("grid", "dirichlet", "spread")
SETTINGS: Final = ("equal", "restricted", "unrestricted")
KINDS: Final = ("room", "control")
MEASURES: Final = ("test", "valid")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OURS: Final = ("train_iters", "seed", "mixing")
"""Settings that the comparison itself makes for every run of a method."""


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
        "label",
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
    common = settings(whole, "set", refused=("seed",))
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
        label=whole.text("label") if whole.has("label") else "",
        path=path,
        tasks=tasks,
        methods=methods,
        baseline=baseline,
        budget=_budget(whole),
        oracle=oracle,
        measure=whole.choice("measure", MEASURES, "test"),
        confidence=whole.number("confidence", 0.95, lambda c: 0 < c < 1, "between 0 and 1"),
    )


def settings(block: Block, key: str, *, refused: Iterable[str] = ()) -> tuple[str, ...]:
    """Return a block of settings as ``key=value`` texts."""
    given = block.block(key)
    for name in given.content:
        if name.split(".")[0].replace("-", "_") in refused:
            raise given.wrong(name, "the comparison sets it for every run: leave it out")
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
            overrides=(*common, *settings(block, "set", refused=("seed",)), *last),
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
    found = {"doremi": ("reference", "reference_losses"), "skillit": ("graph",)}.get(stages, ())
    for key in found:
        if mixing.get(key) is not None:
            raise block.wrong(f"mixing.{key}", f"stages '{stages}' makes it: leave it out")
    points = block.whole("points", 8, 1) if stages == "sweep" else 0
    return Method(
        name=name,
        mixing=mixing,
        overrides=settings(block, "set", refused=_OURS),
        stages=stages,
        share=block.number("share", SHARE, lambda share: 0 < share < 1, "between 0 and 1"),
        sweep=_sweep(block, points, "dirichlet") if stages == "sweep" else None,
        fit=block.choice("fit", FITS, "best"),
        proxy_overrides=settings(block, "proxy_set", refused=_OURS),
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
