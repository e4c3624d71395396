"""Mixing: which domains the next step draws from, decided from what the last ones lost.

Pure NumPy.  ``build_mixer(method, domains=…)`` makes a mixer; ``decide`` and
``observe`` are all that a training loop knows of it.  Importing the package registers
every method.
"""

from megatron.mixing.base import Decision, Mixer, RunContext
from megatron.mixing.build import available_methods, build_mixer
from megatron.mixing.controller import Controller
from megatron.mixing.observation import Observation, ObservationError, Signal
from megatron.mixing.reported import Reported

__all__ = [
    "Controller",
    "Decision",
    "Mixer",
    "Observation",
    "ObservationError",
    "Reported",
    "RunContext",
    "Signal",
    "available_methods",
    "build_mixer",
]
