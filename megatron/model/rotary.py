"""Rotary position embedding (Su et al. 2021), as GPT-NeoX lays it out.

The first ``rotary_pct`` of every head is rotated; component i is paired with component
i + half, not with its neighbour.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.parallel.autograd import apply

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, float32."""


class Rotary:
    """Cosines and sines for a number of rotated dimensions, kept in float32.

    Not a module and without buffers on purpose: casting a model to bf16 casts its buffers,
    and bf16 angles are wrong by whole turns after a few hundred positions.
    """

    def __init__(self, *, dimensions: int, base: float) -> None:
        """Make the tables of ``dimensions`` (even) rotated dimensions per head."""
        assert dimensions % 2 == 0
        self.dimensions = dimensions
        self.base = base
        self._tables: dict[torch.device, Angles] = {}

    def angles(
        self, length: int, device: torch.device, positions: torch.Tensor | None = None
    ) -> Angles:
        """Return what :func:`rotated` turns by, ``[S, dimensions / 2]`` or with B before it.

        Args:
            length: S; with ``positions`` a bound of them, which are all below it.
            device: where it is used.
            positions: int64 ``[B, S]``; None = 0, 1, ….
        """
        cos, sin = self.table(length, device)
        return (cos, sin) if positions is None else (cos[positions], sin[positions])

    def table(self, length: int, device: torch.device) -> Angles:
        """Return cosines and sines, float32 ``[length, dimensions / 2]`` each."""
        held = self._tables.get(device)
        if held is None or held[0].shape[0] < length:
            with torch.no_grad():
                exponents = torch.arange(0, self.dimensions, 2, dtype=torch.float32)
                frequencies = 1.0 / self.base ** (exponents / self.dimensions)
                angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
                held = (angles.cos().to(device), angles.sin().to(device))
            self._tables[device] = held
        return held[0][:length], held[1][:length]


def rotated(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotate ``[B, S, …heads, head_size]`` by what :meth:`Rotary.angles` returned."""
    cos, sin = angles
    if cos.shape[-1] == 0:
        return x
    shape = (*cos.shape[:-1], *(1,) * (x.dim() - 3), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    if torch.compiler.is_compiling():
        return _joined(x, cos, sin)
    if not torch.is_grad_enabled():
        return _rotated(x, cos, sin)
    turned: torch.Tensor = apply(_Rotate, x, cos, sin)
    return turned


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _joined(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate in one expression, for a compiler, which finds the way back by itself."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in turned), x[..., 2 * half :]], dim=-1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Half-precision operands are widened by the float32 tables and rounded once, on writing.
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
