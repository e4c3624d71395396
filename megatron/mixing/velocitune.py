"""Velocitune: more of the domains that have made the least of their way to their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.base import RunContext
from megatron.mixing.dynamic_loading import read_targets
from megatron.mixing.held_out import HeldOutMixer
from megatron.mixing.migrate import Follow, newcomer
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions
from megatron.mixing.simplex import normalise

_STATE_KEYS: Final = ("start", "velocity")


@dataclass(frozen=True, kw_only=True)
class VelocituneOptions(CommonOptions):
    """Options of ``velocitune``; it needs ``targets`` or ``targets_from``.

    Raises:
        ConfigError: both kinds of targets.
    """

    targets: dict[str, float] | list[float] | None = field(
        default=None,
        metadata={
            "help": "the held-out loss that each domain should reach: a mapping that names every "
            "domain, or a list in the order of the domains",
            "unit": "nats per token",
        },
    )
    targets_from: str | None = field(
        default=None,
        metadata={
            "help": "an earlier run whose last validation losses are the targets: its folder, or "
            "its metrics.jsonl"
        },
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        super().__post_init__()
        if self.targets is not None and self.targets_from is not None:
            raise ConfigError("targets and targets_from exclude each other; give one of them")


class Velocitune(HeldOutMixer):
    """Weights that grow with the share of its way that a domain has still to go.

    The held-out losses V are measured before the first step (after the warm-up): V_i(0).  At
    each update

        v_i = (V_i - target_i) / (V_i(0) - target_i), cut to [0, 1],

    and p_i is multiplied by exp(v_i) and normalised.  So what counts is the share of the way
    and not its length, unlike in dynamic batch loading, whose distances favour domains of
    high loss.  A domain that began at its target or below has v = 0 while it stays there and
    1 above it; one without held-out data has v = 0.

    Source: Velocitune (arXiv 2411.14318), its learning velocity and weight update.
    """

    method = "velocitune"
    follows: ClassVar[Mapping[str, Follow]] = {
        "start": newcomer(None),  # a new domain's way begins where it is first measured
        "velocity": newcomer(None),
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: VelocituneOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._targets = read_targets(
            self.method, options.targets, options.targets_from, self.domains
        )
        self._start: FloatArray = np.full(len(self.domains), np.nan)
        self._velocity: FloatArray = np.full(len(self.domains), np.nan)

    def _is_update(self, step: int) -> bool:
        return step == self._options.warmup_steps or super()._is_update(step)

    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        valid_loss = valid_loss[: len(self.domains)]
        # Where the start was not measured, the first measurement is it.
        self._start = np.where(np.isnan(self._start), valid_loss, self._start)
        if step <= self._options.warmup_steps or np.isnan(valid_loss).all():
            return None
        self._velocity = velocity(valid_loss, self._start, self._targets)
        grown = np.where(np.isnan(self._velocity), 0.0, self._velocity)
        return normalise(self._weights * np.exp(grown))

    def _save(self) -> dict[str, Any]:
        return {"start": self._by_name(self._start), "velocity": self._by_name(self._velocity)}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        start, moving = (self._vector(rule[key], key) for key in _STATE_KEYS)
        if np.isinf(start).any() or not ((moving >= 0) & (moving <= 1) | np.isnan(moving)).all():
            raise self._damaged("start or velocity", dict(rule))
        self._start, self._velocity = start, moving

    def _estimates(self) -> dict[str, Any]:
        shown = {"target": self._by_name(self._targets)}
        if not np.isnan(self._velocity).all():
            shown["velocity"] = self._by_name(self._velocity)
        return shown


def velocity(now: FloatArray, start: FloatArray, target: FloatArray) -> FloatArray:
    """Return the share of its way that each loss has still to go, between 0 and 1, [K].

    Args:
        now: present losses, nats per token, [K]; NaN where not measured.
        start: losses at the start, [K].
        target: losses to reach, [K].

    Returns:
        [K]; NaN where a loss is not known.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        way, rest = start - target, now - target
        share = np.where(way > 0, rest / np.where(way > 0, way, 1.0), np.sign(rest))
    return np.where(np.isnan(now) | np.isnan(start), np.nan, np.clip(share, 0.0, 1.0))
