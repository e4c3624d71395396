"""What a simulated run can measure beside its losses: references, gradients, held-out batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron.mixing.controller import Controller
from megatron.mixing.observation import BoolArray, FloatArray, Signal
from megatron.mixing.worlds import World


class SimulatedSignals:
    """Serves the signals of a world.

    Losses above a reference are those of the domains, since a world has no tokens.  The
    reference has trained for as long as the run, on the given weights, unless it is given.

    The gradient of a world is what its law says of one more step: a step on domain j lowers
    loss i by H_ij, and to first order that is lr <g_i, g_j>.

    Args:
        world: of the run.
        mixer: the controller, before its first step (its ``needs``, if it says them).
        steps: of the run.
        learning_rate: lr.
        reference: losses of the reference, nats per token, [K]; None = as said above.
        gap: how much higher than training losses held-out losses are, nats per token, [K].
    """

    def __init__(
        self,
        world: World,
        mixer: Controller,
        *,
        steps: int,
        learning_rate: float = 1e-3,
        reference: FloatArray | None = None,
        gap: FloatArray | None = None,
    ) -> None:
        self._world, self._rate = world, learning_rate
        count = len(world.domains)
        self._gap = np.zeros(count) if gap is None else gap
        self._compared = Signal.EXCESS_LOSS in getattr(mixer, "needs", ())
        aim = getattr(mixer, "gradient_aim", None)
        self._others = aim is not None and aim.others
        self._weights = np.full(count, 1.0 / count) if aim is None else aim.weights[:count]
        self._reference = np.zeros(count) if reference is None else reference
        if self._compared and reference is None:
            self._reference = _trained(world, mixer.decide(1).sampling_weights, steps)

    def ahead(
        self, asked: frozenset[Signal], losses: FloatArray, counts: FloatArray
    ) -> Mapping[str, object]:
        """Return the fields of an observation that a decision asks for before a step trains.

        Args:
            asked: the signals.
            losses: of the step's batch, nats per token, [K].
            counts: samples of the step, [K].
        """
        present = counts > 0
        fields: dict[str, object] = {"learning_rate": self._rate, "sample_count": counts}
        if Signal.GRADIENT_ALIGNMENT in asked:
            fields["gradient_alignment"] = np.where(present, self._alignment(present), 0.0)
        if Signal.BATCH_VALID_LOSS in asked:
            held_out = self._world.losses() + self._gap
            fields["batch_valid_loss"] = np.where(present, held_out, np.nan)
        if asked & {Signal.LOSS, Signal.EXCESS_LOSS}:
            fields |= {"loss_sum": losses * counts, "token_count": counts}
            fields |= self.trained(losses, counts)
        return fields

    def trained(self, losses: FloatArray, counts: FloatArray) -> dict[str, object]:
        """Return the fields that come with the losses of a step."""
        fields: dict[str, object] = {"learning_rate": self._rate}
        if self._compared:
            present = counts > 0
            excess = np.maximum(losses - self._reference, 0.0)
            fields["excess_loss"] = np.where(present, excess, np.nan)
            fields["reference_loss"] = np.where(present, self._reference, np.nan)
        return fields

    def _alignment(self, present: BoolArray) -> FloatArray:
        """Return <g_i, g_v> / mean_j |g_j|, [K]."""
        slopes = self._world.slopes()
        own = np.maximum(np.diag(slopes), 0.0)
        products = self._weights @ slopes
        if self._others:
            scaled = self._weights * len(own)
            products = np.where(present, scaled, 0.0) @ slopes - scaled * own
        norms = np.where(present, np.sqrt(own / self._rate), 0.0)
        return np.asarray(products / self._rate / max(norms.mean(), 1e-300), dtype=np.float64)


def _trained(world: World, weights: FloatArray, steps: int) -> FloatArray:
    """Return the losses after ``steps`` on a fixed mixture, [K]; the world starts anew."""
    world.reset()
    for _ in range(steps):
        world.train(weights)
    losses = world.losses().copy()
    world.reset()
    return losses
