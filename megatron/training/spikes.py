"""Steps whose loss is far above what the steps before lead one to expect.

The expectation knows the domains: each has a level, an exponential moving average of its own
loss, and a step is expected at the mean of the levels over its tokens.  So a mixture that moves
to a harder domain is no spike.  What lies above the expectation by more than sigma standard
deviations of such differences is one.  PaLM's remedy (Chowdhery et al. 2022, section 5.1) is the
policy ``rollback``: the weights of the newest checkpoint, and the data that comes next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.policies import SpikeReaction
from megatron.errors import RunError
from megatron.state import check_state

FloatArray = npt.NDArray[np.float64]

_VERSION = 1
_KEYS = ("levels", "variance", "count", "in_row", "rollbacks")
# So many warnings in a row are no spike but a new level.
_NEW_LEVEL = 10
# Differences smaller than this part of the loss are never a spike.
_LEAST = 1e-3


class SpikeError(RunError):
    """The loss has spiked, and the policy is to stop (or has been followed often enough)."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Spike:
    """How far a step lies above what was expected of it.

    Attributes:
        loss: mean over the step's tokens, nats.
        expected: by the domains' levels.
        deviation: standard deviation of the difference, before this step.
    """

    loss: float
    expected: float
    deviation: float

    def __str__(self) -> str:
        """Say it with numbers."""
        return (
            f"the loss is {self.loss:.4f} where {self.expected:.4f} ± {self.deviation:.4f} was "
            "expected of these domains"
        )


class SpikeGuard:
    """Finds spikes of the loss, and says what becomes of the step.

    Args:
        policy: what a spike does.
        limit: of ``skip``: so many in a row stop the run; of ``rollback``: so often may the run
            go back to one checkpoint.
        sigma: standard deviations that make a spike.
        window: steps that the averages reach back, and that are watched before any is judged.
        domains: names in the order of the totals.
    """

    def __init__(
        self,
        *,
        policy: SpikeReaction,
        limit: int,
        sigma: float,
        window: int,
        domains: Sequence[str],
    ) -> None:
        """Start without any expectation."""
        self.policy = policy
        self._limit = limit
        self._sigma = sigma
        self._window = window
        self._domains = list(domains)
        self._judged: tuple[Spike | None] | None = None
        self.reset()
        self._rollbacks: dict[str, int] = {}

    def reset(self) -> None:
        """Forget what was expected; nothing is judged for a window from here."""
        self._levels: dict[str, float] = {}
        self._variance, self._count, self._in_row = 0.0, 0, 0

    def accepts(self, loss_sum: FloatArray, token_count: FloatArray) -> bool:
        """Judge a step before its update; :meth:`after` will keep to it.

        Args:
            loss_sum: summed loss by domain [K], over all ranks.
            token_count: likewise, of the tokens.
        """
        self._judged = (self._judge(loss_sum, token_count),)
        return self._judged[0] is None

    def after(self, step: int, loss_sum: FloatArray, token_count: FloatArray) -> Spike | None:
        """Judge a finite step and learn from it; return the spike that it was, if it was one.

        Raises:
            SpikeError: the policy is to stop, or k steps in a row were left out.
        """
        judged, self._judged = self._judged, None
        spike = judged[0] if judged is not None else self._judge(loss_sum, token_count)
        if spike is None:
            self._in_row = 0
            self._learn(loss_sum, token_count)
            return None
        self._in_row += 1
        if self.policy == "stop" or (self.policy == "skip" and self._in_row >= self._limit):
            row = f" ({self._in_row} in a row)" if self._in_row > 1 else ""
            raise SpikeError(
                f"step {step}: {spike}{row}; the last checkpoint is intact: lower the learning "
                "rate, look at the step's samples (audit_samples), raise loss_spike_sigma, or "
                "take on_loss_spike: rollback(2)"
            )
        if self.policy == "warn" and self._in_row >= _NEW_LEVEL:
            self.reset()
        return spike

    def count_rollback(self, step: int, spike: Spike, checkpoint: str) -> None:
        """Count that the run goes back to a checkpoint.

        Raises:
            SpikeError: it has done so often enough.
        """
        done = self._rollbacks.get(checkpoint, 0)
        if done >= self._limit:
            raise SpikeError(
                f"step {step}: {spike}; the run has gone back to {checkpoint} {done} times "
                "already: lower the learning rate, or start from an earlier checkpoint"
            )
        self._rollbacks = {checkpoint: done + 1}  # of an older one there is no way back to
        self.reset()

    def _judge(self, loss_sum: FloatArray, token_count: FloatArray) -> Spike | None:
        if self._count < self._window or not np.isfinite(loss_sum).all():
            return None
        compared = self._compare(loss_sum, token_count)
        if compared is None:
            return None
        loss, expected = compared
        deviation = math.sqrt(self._variance)
        if loss - expected <= max(self._sigma * deviation, _LEAST * abs(expected)):
            return None
        return Spike(loss=loss, expected=expected, deviation=deviation)

    def _compare(self, loss_sum: FloatArray, token_count: FloatArray) -> tuple[float, float] | None:
        """Return (mean loss, expected) over the domains whose level is known."""
        tokens = loss = expected = 0.0
        for name, total, count in zip(self._domains, loss_sum, token_count, strict=True):
            if count > 0 and name in self._levels:
                tokens += float(count)
                loss += float(total)
                expected += float(count) * self._levels[name]
        return (loss / tokens, expected / tokens) if tokens else None

    def _learn(self, loss_sum: FloatArray, token_count: FloatArray) -> None:
        if not np.isfinite(loss_sum).all():
            return
        self._count += 1
        rate = max(2.0 / (self._window + 1), 1.0 / self._count)
        compared = self._compare(loss_sum, token_count)
        if compared is not None:
            difference = compared[0] - compared[1]
            self._variance += rate * (difference * difference - self._variance)
        for name, total, count in zip(self._domains, loss_sum, token_count, strict=True):
            if count > 0:
                mean = float(total / count)
                self._levels[name] = self._levels.get(name, mean)
                self._levels[name] += rate * (mean - self._levels[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, JSON-able, the same on every rank."""
        return {
            "version": _VERSION,
            "levels": dict(self._levels),
            "variance": self._variance,
            "count": self._count,
            "in_row": self._in_row,
            "rollbacks": dict(self._rollbacks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; domains that have gone since are kept, new ones learnt."""
        check_state("the loss-spike guard", state, version=_VERSION, keys=_KEYS)
        self._levels = {name: float(level) for name, level in state["levels"].items()}
        self._variance, self._count = float(state["variance"]), int(state["count"])
        self._in_row = int(state["in_row"])
        self._rollbacks = {name: int(times) for name, times in state["rollbacks"].items()}
