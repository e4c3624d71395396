"""Static: the given weights, from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.mixing.base import Decision, Mixer
from megatron.mixing.observation import FloatArray, Signal
from megatron.mixing.options import CommonOptions
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class StaticOptions(CommonOptions):
    """Options of ``static``: floors and ceilings; nothing is learnt, so cadence changes nothing."""


class Static(Mixer):
    """The given weights, normalised (see :mod:`megatron.mixing.weights` for the usual ones)."""

    method = "static"
    needs: frozenset[Signal] = frozenset()

    def _decide(self, step: int) -> Decision:
        return Decision(sampling_weights=self._initial.copy())

    def _update(self, step: int, window: Window) -> FloatArray | None:
        return None
