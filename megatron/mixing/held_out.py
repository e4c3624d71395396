"""What the methods driven by held-out losses share: a measurement after every update's step."""

from __future__ import annotations

from abc import abstractmethod

from megatron.mixing.base import Mixer
from megatron.mixing.decision import Decision
from megatron.mixing.observation import FloatArray, Signal
from megatron.mixing.window import Window


class HeldOutMixer(Mixer):
    """A mixer whose weights change when the held-out losses have been measured.

    That is after the steps that are multiples of ``update_every`` and lie beyond the
    warm-up: the decision of the step after asks for the measurement.  Measurements of
    other steps change nothing.
    """

    needs = frozenset({Signal.VALID_LOSS})

    @abstractmethod
    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        """Apply the rule to the losses measured after ``step``.

        Args:
            step: the update's step, t in the formulas.
            valid_loss: nats per token, [K + M], in the order of ``measured``; NaN for a
                domain without held-out data.

        Returns:
            The new distribution before floors and ceilings, [K]; None to keep the old.
        """

    def _decide(self, step: int) -> Decision:
        due = self._is_update(step - 1) and not self._measured_before(step)
        return Decision(sampling_weights=self._weights.copy(), validate=due)

    def _is_update(self, step: int) -> bool:
        return step > self._options.warmup_steps and step % self._options.update_every == 0

    def _measure(self, step: int, valid_loss: FloatArray) -> None:
        if not self._is_update(step):
            return
        weights = self._learn(step, valid_loss)
        if weights is not None:
            self._set_weights(weights)

    def _update(self, step: int, window: Window) -> FloatArray | None:
        return None
