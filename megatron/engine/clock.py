"""Where the time of a step goes: reading, forward, backward, the sum over ranks, the update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from megatron.engine.observer import StepOutcome

Item = TypeVar("Item")

TIMERS = ("forward", "backward", "backward-allreduce", "optimizer", "batch generator", "pipe")
"""What is told apart, by GPT-NeoX's names; ``pipe`` is waiting for and sending to other stages.

``backward-allreduce`` is the part of ``backward`` after which gradients are summed; in a pipeline
it stands beside it. What overlaps with ``backward`` is counted there.
"""

_INSTRUCTIONS = {
    "_exec_forward_pass": "forward",
    "_exec_backward_pass": "backward",
    "_exec_reduce_grads": "backward-allreduce",
    "_exec_reduce_tied_grads": "backward-allreduce",
    "_exec_optimizer_step": "optimizer",
    "_exec_send_activations": "pipe",
    "_exec_recv_activations": "pipe",
    "_exec_send_grads": "pipe",
    "_exec_recv_grads": "pipe",
}
_METHODS = {
    "forward": "forward",
    "backward": "backward",
    "allreduce_gradients": "backward-allreduce",
    "step": "optimizer",
}


class StepClock:
    """Takes the times of this rank; see :class:`megatron.engine.observer.StepObserver`.

    On a GPU it waits for the device before and after each part, which costs a little time.
    """

    def __init__(self, engine: Any, *, logged: Callable[[int], bool], device: torch.device) -> None:
        """Hook into DeepSpeed's engine.

        Args:
            engine: DeepSpeed's.
            logged: whether a step is recorded.
            device: that the engine computes on.
        """
        self._logged, self._device = logged, device
        self._seconds: dict[str, float] = {}
        self._active = False
        instructions = getattr(engine, "_INSTRUCTION_MAP", None)
        if instructions is None:
            for method, name in _METHODS.items():
                setattr(engine, method, self._timed(name, getattr(engine, method)))
            return
        # The pipeline's schedule looks its instructions up here and binds them to the engine.
        engine._INSTRUCTION_MAP = {
            command: self._timed(_INSTRUCTIONS[function.__name__], function)
            if function.__name__ in _INSTRUCTIONS
            else function
            for command, function in instructions.items()
        }

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Start at 0."""
        self._active = self._logged(step)
        self._seconds = {}

    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Return the seconds of a logged step by part, as ``timers/NAME``."""
        self._active = False
        return {f"timers/{name}": self._seconds[name] for name in TIMERS if name in self._seconds}

    def reading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass micro-batches on, and take the time until each is there."""
        source = iter(batches)
        while True:
            try:
                item = self._timed("batch generator", next)(source)
            except StopIteration:
                return
            yield item

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return function(*args, **kwargs)
            began = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - began

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
