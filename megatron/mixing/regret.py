"""Every method in every world: how far it ends from the best fixed mixture."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.mixing.base import RunContext
from megatron.mixing.build import build_mixer
from megatron.mixing.observation import FloatArray
from megatron.mixing.simulate import Draw, Multinomial, Simulated, simulate
from megatron.mixing.worlds import Optimum, PowerWorld, World, hub_transfer, power_world
from megatron.mixing.worlds import random_linear as linear_world

BATCH: Final = 256
NOISE: Final = 1.0
"""Standard deviation of the loss of one sample, nats per token."""
MIXTURE: Final = "its mixture)"
"""Ends the label of a run that trains on the mixture which a proxy run came to."""
VOCABULARY: Final = 50_000
COUNTED: Final = 0.05
"""How far above a law's asymptote the loss of counts is taken to be, nats per token."""
AVERAGED: Final = "aioli"
"""The run whose ledger ``replay`` and ``average_of_ledger`` read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One method in one world.

    Attributes:
        label: the method, and what is not its default.
        world: the world's name.
        run: what happened.
        best: the best fixed mixture of the world.
    """

    label: str
    world: str
    run: Simulated
    best: Optimum

    @property
    def regret(self) -> float:
        """Final mean loss above the best fixed mixture's, nats per token."""
        return self.run.final - self.best.value


def worlds() -> dict[str, World]:
    """Return the worlds of the table, by name."""
    return {
        "separate": power_world(batch=BATCH),
        "transfer": power_world(transfer=hub_transfer(), batch=BATCH),
        "linear": linear_world(7, seed=4, half_life=2_000),
    }


def methods(
    world: World, best: Optimum, *, steps: int, ledger: str
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return what is compared, by label: method and options, cadences as a share of the run."""
    every = max(steps // 40, 150)
    fits = max(steps // 20, 150)
    help_of = world.transfer.T if isinstance(world, PowerWorld) else _relative(world)
    probes = {"update_every": every, "lp_rounds": 1, "lp_steps": max(every // 20, 1)}
    return {
        "static (uniform)": ("static", {}),
        "schedule (uniform, then best)": (
            "schedule",
            {
                "interpolation": "linear",
                "stages": [
                    {"weights": "uniform", "fraction": 0.5},
                    {"weights": best.weights.tolist()},
                ],
            },
        ),
        "odm": ("odm", {}),
        "odm (inclusion)": ("odm", {"importance": "inclusion"}),
        "exp3": ("exp3", {}),
        "smoothed_mean": ("smoothed_mean", {}),
        "smoothed_mean_exp": ("smoothed_mean_exp", {}),
        "ema": ("ema", {}),
        "naive_validation": ("naive_validation", {"update_every": every}),
        "dynamic_loading (best's losses)": (
            "dynamic_loading",
            {"update_every": every, "targets": best.losses.tolist()},
        ),
        "velocitune (best's losses)": (
            "velocitune",
            {"update_every": every, "targets": best.losses.tolist()},
        ),
        "skillit (identity)": ("skillit", {"update_every": every}),
        "skillit (true graph)": (
            "skillit",
            {"update_every": every, "graph": help_of.tolist()},
        ),
        "validation_gap": ("validation_gap", {}),
        "doremi (proxy)": ("doremi", {"reference": "simulated"}),
        "doremi (its mixture)": ("doremi", {"reference": "simulated"}),
        "doge (proxy)": ("doge", {}),
        "doge (its mixture)": ("doge", {}),
        "doge (all, its mixture)": ("doge", {"target": "all"}),
        "ado": ("ado", {"first_fit": fits, "fit_every": fits}),
        "ado (own counts)": ("ado", {"first_fit": fits, "fit_every": fits, "count": "own"}),
        "auto (asymptotes)": ("auto", {"count_losses": _ends(world)}),
        "aioli": ("aioli", {**probes, "eta": 0.5}),
        "aioli (ema)": ("aioli", {**probes, "eta": 5.0, "ema": 0.1}),
        "aioli (diagonal)": ("aioli", {**probes, "eta": 0.5, "diagonal": True}),
        "replay (of aioli)": ("replay", {"ledger": ledger}),
        "average_of_ledger (of aioli)": ("average_of_ledger", {"ledger": ledger}),
    }


def _ends(world: World) -> list[float]:
    """Return what stands for the losses of counts: a little above the asymptotes, 0 without any."""
    if not isinstance(world, PowerWorld):
        return [0.0] * len(world.domains)
    return [float(loss) + COUNTED for loss in world.epsilon[: len(world.domains)]]


def _relative(world: World) -> Any:
    """Return Skill-It's graph of a linear world: the share of j's loss that a step on i takes."""
    matrix = np.asarray(getattr(world, "matrix"))  # noqa: B009 - a linear world's
    world.reset()
    scaled = matrix.T / world.losses()[None, :]
    return scaled / scaled.max()


def compare(*, steps: int, only: Iterable[str] | None = None) -> list[Entry]:
    """Run every method in every world.

    Args:
        steps: of each run.
        only: labels to run; None = all.
    """
    entries = []
    chosen = None if only is None else set(only)
    with tempfile.TemporaryDirectory(prefix="simulated-") as folder:
        for name, world in worlds().items():
            best = world.best_fixed(steps)
            ledger = Path(folder) / f"{name}.jsonl"
            for label, (method, options) in methods(
                world, best, steps=steps, ledger=str(ledger)
            ).items():
                wanted = chosen is None or label in chosen
                if not wanted and label != AVERAGED:
                    continue
                run = _run(method, options, world, steps, every=1 if label == AVERAGED else 10)
                if label.endswith(MIXTURE):
                    run = _run("static", {}, world, steps, every=10, weights=run.result)
                if label == AVERAGED:
                    _write_ledger(ledger, world.domains, run)
                if wanted:
                    entries.append(Entry(label=label, world=name, run=run, best=best))
    return entries


def _run(
    method: str,
    options: Mapping[str, Any],
    world: World,
    steps: int,
    *,
    every: int,
    weights: FloatArray | None = None,
) -> Simulated:
    context = RunContext(
        total_steps=steps,
        samples_per_step=BATCH,
        draws_per_step=BATCH,
        vocab_size=VOCABULARY,
    )
    mixer = build_mixer(
        method, domains=list(world.domains), weights=weights, context=context, **options
    )
    draw: Draw | None = None
    if method in ("odm", "exp3", "smoothed_mean", "smoothed_mean_exp", "ema", "validation_gap"):
        draw = Multinomial(BATCH, seed=1)
    return simulate(
        mixer, world, steps=steps, batch=BATCH, draw=draw, noise=NOISE, record_every=every
    )


def _write_ledger(path: Path, domains: tuple[str, ...], run: Simulated) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for step, weights in zip(run.steps.tolist(), run.weights.tolist(), strict=True):
            record = {"step": step, "probability": dict(zip(domains, weights, strict=True))}
            lines.write(json.dumps(record) + "\n")


def as_table(entries: list[Entry]) -> str:
    """Return the regrets as a Markdown table, in thousandths of a nat."""
    names = list(dict.fromkeys(entry.world for entry in entries))
    found = {(entry.label, entry.world): entry for entry in entries}
    lines = [
        f"| method | {' | '.join(names)} | validations | probe steps |",
        f"|---|{'---:|' * (len(names) + 2)}",
    ]
    for label in dict.fromkeys(entry.label for entry in entries):
        row = [found[label, name] for name in names]
        regrets = " | ".join(f"{1000 * entry.regret:.1f}" for entry in row)
        share = row[0].run.probe_steps / int(row[0].run.steps[-1])
        probes = f"{share:.0%}" if share else "–"
        lines.append(f"| {label} | {regrets} | {row[0].run.validations or '–'} | {probes} |")
    return "\n".join(lines)
