"""What mixing methods are worth and cost, for the joint search: from comparisons and laws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from megatron.errors import ConfigError, RunError, did_you_mean
from megatron.experiments.bounds import FloatArray
from megatron.experiments.compare.results import load_compare
from megatron.experiments.libraries import load
from megatron.experiments.static_bootstrap import replicated_laws
from megatron.experiments.static_law import fit_static_law
from megatron.experiments.study import PLAN

BASE: Final = "as configured"
LAW_SEED: Final = 17


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingOption:
    """A way of mixing that the search may take.

    Attributes:
        name: of it.
        effect: on the mean held-out loss beside the configuration's own way, nats per token;
            below 0 is better.
        draws: effects that the runs allow, [R].
        overhead: part of the training budget that it spends beside training steps.
        charged: whether ``effect`` was measured at equal budgets, so that the overhead's price is
            in it already.
        block: of the configuration; None: its own.
        how: where the numbers are from.
        notes: what stands between them and a run of another kind.
    """

    name: str
    effect: float
    draws: FloatArray
    overhead: float = 0.0
    charged: bool = True
    block: Mapping[str, Any] | None = None
    how: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)


def base_option(replicates: int) -> MixingOption:
    """Return the configuration's own way, which the others are compared with."""
    return MixingOption(
        name=BASE, effect=0.0, draws=np.zeros(replicates), how="the base, by definition"
    )


def league_options(
    folder: Path, *, task: str | None, replicates: int, seed: int
) -> tuple[list[MixingOption], list[str]]:
    """Return the methods of a finished comparison, and why some of them are left out.

    Args:
        folder: ``--out`` of ``tools/mix.py compare``.
        task: of it; None: its only one.
        replicates: draws of each effect, by Student's t over the seeds.
        seed: of the draws.

    Raises:
        RunError: there is no comparison.
        ConfigError: no such task, or several and none is named.
    """
    facts = load_compare(folder)
    one = _task(facts, folder, task)
    mixing = _blocks(folder)
    setting = str(facts["budget"]["setting"])
    options, left_out = [], []
    for number, (name, method) in enumerate(one["methods"].items()):
        why = _why_not(name, method, facts["baseline"])
        if why is not None:
            left_out += [f"{name}: {why}"] if why else []
            continue
        found = method["difference"]["average"]
        spent = method["spent"]
        block = next(
            (mixing[end["run"]] for end in method["by_seed"].values() if end["run"] in mixing), None
        )
        notes = [] if block else ["its options are the defaults, not those that were compared"]
        options.append(
            MixingOption(
                name=name,
                effect=float(found["mean"]),
                draws=_t_draws(found, replicates, seed + number),
                overhead=1.0 - float(spent["training"]) / float(spent["total"]),
                charged=setting == "equal",
                block=block or {"method": method["method"]},
                how=f"{found['count']} seeds against {facts['baseline']}, runs of "
                f"{one['budget']:.3g} FLOPs",
                notes=tuple(notes),
            )
        )
    return options, left_out


def law_option(
    folder: Path,
    *,
    domains: Sequence[str],
    base: Mapping[str, float],
    replicates: int,
    seed: int = 0,
) -> MixingOption:
    """Return the best mixture of a fitted static law.

    Args:
        folder: with ``law.json`` of ``tools/mix.py fit-law``.
        domains: of the configuration.
        base: its own mixture, which the law's is compared with.
        replicates: laws fitted anew to resampled residuals.
        seed: of the resampling.

    Raises:
        RunError: there is no law, or it is damaged.
        ConfigError: it is of other domains.
        MissingExtraError: scipy is not installed.
    """
    path = folder if folder.is_file() else folder / "law.json"
    if not path.is_file() and (folder / "law" / "law.json").is_file():
        path = folder / "law" / "law.json"
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for name in facts["domains"]]
        mixtures = np.array([run["mixture"] for run in facts["fitted"]], dtype=np.float64)
        losses = np.array([run["losses"] for run in facts["fitted"]], dtype=np.float64)
        best = np.array(facts["mixture"], dtype=np.float64)
        runs = int(facts["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read as a law ({error}); give --out of tools/mix.py fit-law"
        ) from None
    if set(names) != set(domains):
        raise ConfigError(
            f"{path} is a law of {', '.join(names)}, and the configuration trains on "
            f"{', '.join(domains)}; a law holds for its own domains"
        )
    own = np.array([base[name] for name in names])
    fit = fit_static_law(mixtures, losses)
    both = np.stack((best, own / own.sum()))

    def effect(law: Any) -> float:
        found = law.predict(both).mean(axis=1)
        return float(found[0] - found[1])

    drawn = [effect(law) for law in replicated_laws(fit, replicates, LAW_SEED + seed)]
    notes = ["the sweep that found it is not charged"]
    if "carried" in facts:
        notes.append("its losses are extrapolated over steps or sizes")
    return MixingOption(
        name="static by law",
        effect=effect(fit.law),
        draws=np.array(drawn),
        block={
            "method": "static",
            "weights": {name: float(p) for name, p in zip(names, best, strict=True)},
        },
        how=f"a static law of {runs} runs",
        notes=tuple(notes),
    )


def _task(facts: Mapping[str, Any], folder: Path, task: str | None) -> Mapping[str, Any]:
    tasks: Mapping[str, Any] = facts["tasks"]
    if task is None and len(tasks) > 1:
        raise ConfigError(
            f"{folder} compares on {', '.join(tasks)}; say on which task the methods are to be "
            "judged (--league-task)"
        )
    name = task if task is not None else next(iter(tasks))
    if name not in tasks:
        raise ConfigError(
            f"--league-task {name}: no task of {folder}{did_you_mean(name, tasks)} "
            f"(known: {', '.join(tasks)})"
        )
    found: Mapping[str, Any] = tasks[name]
    return found


def _why_not(name: str, method: Mapping[str, Any], baseline: str) -> str | None:
    """Return why a method is no option; "" where nobody would expect it; None if it is one."""
    if name == baseline or method.get("stages") is None:
        return ""
    if method["stages"] != "none" or method.get("prior"):
        return "it needs runs before the one that counts, which one configuration does not say"
    if not method.get("difference") or not method.get("spent"):
        return "it has no difference to the baseline"
    if method["difference"]["average"]["count"] < 2:
        return "one seed says nothing of its spread"
    return None


def _t_draws(found: Mapping[str, Any], replicates: int, seed: int) -> FloatArray:
    stats = load("scipy.stats", "how sure a difference is")
    count = int(found["count"])
    generator = np.random.default_rng(seed)
    drawn = stats.t.rvs(count - 1, size=replicates, random_state=generator)
    return np.asarray(found["mean"] + found["sd"] / np.sqrt(count) * drawn)


def _blocks(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the mixing block of the comparison's runs by name, where their folders are there."""
    place = folder if folder.is_dir() else folder.parent
    try:
        runs = json.loads((place / PLAN).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError):
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        try:
            text = (Path(run["folder"]) / "config.yml").read_text(encoding="utf-8")
            block = yaml.safe_load(text)["mixing"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
        # Weights belong to the domains that were compared on.
        found[str(run["run"])] = {key: value for key, value in block.items() if key != "weights"}
    return found
