"""The ``mixing:`` blocks of a method's runs, as overrides of a task's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megatron.config import Config

_KEPT: Final = ("lag", "unit", "draw", "on_exhausted", "validation_samples")
_DIGITS: Final = 12
GIVEN: Final = (
    "reference",
    "reference_losses",
    "targets",
    "targets_from",
    "ledger",
    "graph",
    "count_losses",
)
"""Options whose value somebody had to find out before, for which nobody is charged here."""

Block = Mapping[str, Any]


def static(weights: Mapping[str, float] | str | None) -> dict[str, Any]:
    """Return the block of a fixed mixture; None: the task's own weights."""
    block: dict[str, Any] = {"method": "static"}
    if isinstance(weights, Mapping):
        block["weights"] = {name: round(float(p), _DIGITS) for name, p in weights.items()}
    elif weights is not None:
        block["weights"] = weights
    return block


def with_weights(block: Block, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return a method's block with a mixture as its given weights."""
    return {**block, "weights": static(weights)["weights"]}


def mixing_overrides(config: Config, block: Block) -> tuple[str, ...]:
    """Return the overrides that put a block in the place of a configuration's own.

    What the block does not say of how decisions become samples, and of the weights to start
    from, stays as the configuration has it.
    """
    mixing = config.mixing
    kept: dict[str, Any] = {key: getattr(mixing, key) for key in _KEPT}
    if mixing.weights in (None, "given"):
        weights = {name: domain.weight for name, domain in config.domains.items()}
        given = {name: w for name, w in weights.items() if w is not None}
        if given:
            kept["weights"] = given
    else:
        kept |= {"weights": mixing.weights, "weights_alpha": mixing.weights_alpha}
    whole = {**kept, **block}
    return ("mixing=null", f"mixing={json.dumps(whole, ensure_ascii=False)}")


def run_overrides(
    config: Config, block: Block, *, steps: int, seed: int | None, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return all that a run of a method has of its own.

    Args:
        config: the task's configuration.
        block: of the mixture.
        steps: of the run.
        seed: of the run; None: the configuration's.
        more: the method's further settings.
    """
    own = [f"train_iters={steps}"]
    whole, decay = config.training.train_iters, config.schedule.lr_decay_iters
    if decay is not None and steps != whole:  # given in steps, it would not follow by itself
        own.append(f"lr_decay_iters={max(1, round(decay * steps / whole))}")
    if seed is not None:
        own.append(f"seed={seed}")
    return (*more, *mixing_overrides(config, block), *own)


def uncharged(block: Block) -> list[str]:
    """Name the options of a block that hold what earlier work has found."""
    return [key for key in GIVEN if block.get(key) is not None]
