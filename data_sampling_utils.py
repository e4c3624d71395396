"""The public API of the mixing methods, in one import that needs NumPy alone.

from data_sampling_utils import Observation, build_mixer, available_methods

mixer = build_mixer("odm", domains=["code", "prose"], smoothing_factor=0.9)
for step in range(1, steps + 1):
    p = mixer.decide(step=step).sampling_weights          # float64 [K]
    …                                                     # draw by p, train
    mixer.observe(Observation(step=step, loss_sum=[…], token_count=[…]))
"""

from __future__ import annotations

from megatron.data.count_model import CountLoss, count_loss
from megatron.mixing import (
    Controller,
    Decision,
    Mixer,
    Observation,
    ObservationError,
    Reported,
    RunContext,
    Signal,
    available_methods,
    build_mixer,
)
from megatron.mixing.weights import (
    document_weights,
    natural_weights,
    nopack_weights,
    padded_windows,
    temperature_weights,
    uniform_weights,
)

__all__ = [
    "Controller",
    "CountLoss",
    "Decision",
    "Mixer",
    "Observation",
    "ObservationError",
    "Reported",
    "RunContext",
    "Signal",
    "available_methods",
    "build_mixer",
    "count_loss",
    "document_weights",
    "natural_weights",
    "nopack_weights",
    "padded_windows",
    "temperature_weights",
    "uniform_weights",
]
