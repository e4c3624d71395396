"""Mixers of every method for tests that are the same for all of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import reject

from data_sampling_utils import Mixer, Observation, RunContext, available_methods, build_mixer

ALONE = [method for method in available_methods() if method != "aioli"]
"""The methods that take a single domain."""
HELD_OUT = {"aioli", "dynamic_loading", "naive_validation", "skillit", "velocitune"}
"""The methods whose estimates move with held-out losses alone."""
LEDGERS = {"replay", "average_of_ledger"}


def build_any(method: str, *, domains: list[str], of: int | None = None, **arguments: Any) -> Mixer:
    """Build a mixer with what its method cannot go without, as small as it goes.

    ``of`` says how many groups the domains are in, where the method acts on those.
    """
    units = len(domains) if of is None else of
    if method == "aioli":
        if units < 2:
            reject()
        every = arguments.pop("update_every", 1) + units
        arguments |= {"lp_rounds": 1, "lp_steps": 1, "update_every": every}
    elif method in ("dynamic_loading", "velocitune"):
        arguments.setdefault("targets", [1.0] * units)
    elif method == "auto":
        arguments.setdefault("count_losses", [0.5] * units)
    elif method == "doremi":
        arguments.setdefault("reference", "runs/reference")
        arguments.setdefault("context", RunContext(vocab_size=100))
    elif method in LEDGERS:
        weights = list(arguments.get("weights") or [1.0] * len(domains))
        total = sum(weights)
        row = dict(zip(domains, [float(weight) / total for weight in weights], strict=True))
        arguments["ledger"] = _ledger(json.dumps(row))
    return build_mixer(method, domains=domains, **arguments)


def go(mixer: Any, observation: Observation) -> None:
    """Take a mixer through a step as a loop would: measure what it asks for, then observe.

    What is measured is made up of the step's losses.
    """
    full = with_signals(observation)
    if observation.step > mixer.step and mixer.decide(observation.step).measure:
        mixer.foresee(full)
    mixer.observe(full)


def with_signals(observation: Observation) -> Observation:
    """Return a step with every signal that a method may read."""
    tokens = np.array(observation.token_count)
    with np.errstate(over="ignore", invalid="ignore"):
        loss = np.array(observation.loss_sum) / np.maximum(tokens, 1.0)
        loss = np.where((tokens > 0) & np.isfinite(loss), loss, np.nan)
        excess = np.maximum(loss - 1.0, 0.0)
        alignment = np.where(tokens > 0, np.nan_to_num(np.sin(loss) * 3.0), 0.0)
    return dataclasses.replace(
        observation,
        excess_loss=excess,
        reference_loss=np.where(np.isnan(loss), np.nan, 1.0),
        batch_valid_loss=loss / 2.0,
        gradient_alignment=alignment,
        learning_rate=1e-2,
    )


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ledgers-")


@functools.cache
def _ledger(row: str) -> str:
    path = Path(_folder().name) / f"{abs(hash(row))}.jsonl"
    path.write_text(f'{{"step": 1, "probability": {row}}}\n')
    return str(path)
