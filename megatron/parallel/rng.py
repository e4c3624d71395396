"""Randomness as a function of names and numbers: nothing to save, nothing to restore."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from megatron.parallel.topology import Topology


def digest(*parts: int | str) -> int:
    """Return a 128-bit number that depends on every part, the same on every machine."""
    text = repr([part if isinstance(part, str) else int(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """Return a counter-based generator (Philox) keyed by ``parts``."""
    return np.random.Generator(np.random.Philox(key=digest(*parts)))


@dataclass(frozen=True, kw_only=True)
class DropoutKey:
    """The micro-batch that a dropout mask belongs to."""

    step: int
    micro_batch: int


class DropoutRng:
    """Masks that depend on (seed, step, micro-batch, data rank, layer, place) and nothing else.

    Where each mask is drawn, torch's default generator is seeded for the length of that
    draw and put back afterwards: fused dropout and attention kernels take no other.  A
    resumed run therefore needs no generator state, and recomputed activations draw their
    first masks again even when other micro-batches ran in between.
    """

    def __init__(self, *, seed: int, topology: Topology, inputs_on_host: bool = False) -> None:
        """Make the masks of a run with ``seed`` on the rank of ``topology``.

        With ``inputs_on_host`` what is recomputed keeps its inputs in the host's memory.

        Whoever counts what passes through looks at ``recomputing``: it is true while what has
        run forward before runs once more for backward.
        """
        self._seed = seed
        self.topology = topology
        self._inputs_on_host = inputs_on_host
        self._key: DropoutKey | None = None
        self.recomputing = False

    def begin(self, *, step: int, micro_batch: int) -> None:
        """Say which step and micro-batch (0, 1, … in the step) runs forward next."""
        self._key = DropoutKey(step=step, micro_batch=micro_batch)

    @contextlib.contextmanager
    def masks(self, device: torch.device, *place: int | str, split: bool) -> Iterator[None]:
        """Draw from this place's own stream inside the ``with`` block.

        Args:
            device: where the masks are drawn.
            place: layer number and name of the place in it.
            split: whether tensor ranks hold different values here (heads, parts of the
                sequence), so that each needs a stream of its own; otherwise all draw the same.

        Raises:
            RuntimeError: :meth:`begin` has not been called.
        """
        with _default_generator(device, self.seed(*place, split=split)):
            yield

    def seed(self, *place: int | str, split: bool) -> int:
        """Return what a place's own stream is seeded with, see :meth:`masks`; below 2⁶³.

        Raises:
            RuntimeError: :meth:`begin` has not been called.
        """
        if self._key is None:
            raise RuntimeError(
                "dropout is on, but begin(step=…, micro_batch=…) was not called before forward"
            )
        coordinates = self.topology.coordinates
        shard = coordinates.tensor if split else -1
        step, micro_batch = self._key.step, self._key.micro_batch
        key = (self._seed, "dropout", step, micro_batch, coordinates.data, shard, *place)
        return digest(*key) % (1 << 63)

    def by_slot(
        self, device: torch.device, rows: int, shape: tuple[int, ...], *place: int | str
    ) -> torch.Tensor:
        """Return numbers from [0, 1), float32 ``[rows, *shape]``, that no layout changes.

        They depend on (seed, step, slot in the global batch, place): the global batch lies on
        the data ranks micro-batch by micro-batch, each with ``rows`` of them.

        Raises:
            RuntimeError: :meth:`begin` has not been called.
        """
        if self._key is None:
            raise RuntimeError("begin(step=…, micro_batch=…) was not called before forward")
        data = self.topology
        first = (self._key.micro_batch * data.data_size + data.data_rank) * rows
        drawn = []
        for slot in range(first, first + rows):
            seed = digest(self._seed, "slot", self._key.step, slot, *place) % (1 << 63)
            own = torch.Generator(device).manual_seed(seed)
            drawn.append(torch.rand(shape, generator=own, device=device))
        return torch.stack(drawn)

    def recomputed(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call ``function`` and recompute its activations in backward instead of keeping them.

        The masks of the recomputation are those of this micro-batch, whichever runs then.
        """
        key, runs = self._key, 0

        def run(*arguments: Any) -> Any:
            nonlocal runs
            before, self._key, self.recomputing = self._key, key, runs > 0
            runs += 1
            try:
                return function(*arguments)
            finally:
                self._key, self.recomputing = before, False

        # Inside, what recomputation keeps for itself is not concerned: only the inputs are.
        with save_on_cpu(pin_memory=_on_gpu(inputs)) if self._inputs_on_host else nullcontext():
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def _on_gpu(inputs: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)


@contextlib.contextmanager
def _default_generator(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generator of ``device`` for a block, then put it back."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        default = torch.cuda.default_generators[index]
    else:
        default = torch.default_generator
    state = default.get_state()
    default.manual_seed(seed)
    try:
        yield
    finally:
        default.set_state(state)
