"""Memory for the logits of a chunk, kept from one micro-batch to the next."""

from __future__ import annotations

import torch

_KEPT_BYTES = 256 << 20


class Scratch:
    """One buffer on the host.

    New memory of such size comes a page at a time and zeroed by the kernel, at every micro-batch
    anew.  Keeping it raises no peak: it is needed when all activations are there.  Device memory
    is left to torch's allocator, which keeps it, and so is what is larger than 256 MiB.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._kept: torch.Tensor | None = None

    def take(self, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return ``[rows, columns]`` of the type and device of ``like``, holding anything.

        What was taken before must not be in use any more.
        """
        size = rows * columns
        if like.device.type != "cpu" or size * like.element_size() > _KEPT_BYTES:
            return like.new_empty(rows, columns)
        kept = self._kept
        if kept is None or kept.dtype != like.dtype or kept.numel() < size:
            kept = self._kept = torch.empty(size, dtype=like.dtype)
        return kept[:size].view(rows, columns)
