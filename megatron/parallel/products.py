"""Matrix products with the weights of linear layers, by the library that is fastest at them.

torch multiplies float32 by MKL, whose kernels for AMD's processors are those of AVX2.  oneDNN,
which torch carries for half precision and convolutions, takes AVX-512 there: up to a quarter less
time on a core of Zen 4, half the time on one of Zen 5, whose units are as wide as the registers
(``benchmarks/products.py``).  Elsewhere they are torch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from megatron.parallel.autograd import apply

_SMALLEST = 1 << 22
"""Multiplications from which on a product is worth the call's overhead, some 10 µs."""
_FEWEST_ROWS = 32
"""A product with fewer rows takes as long as its weight takes to be read, by either library."""
_ROWS_AT_ONCE = 256
"""Of a result that is to be elsewhere than oneDNN puts it: so many stay in the cache meanwhile."""


def _is_amd_with_avx512(described: str) -> bool:
    """Tell from the text of /proc/cpuinfo whether oneDNN is the faster one on this processor."""
    words = described.split("\n\n", 1)[0].split()
    return "AuthenticAMD" in words and "avx512f" in words


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# Looked up at the import: the compiler could not trace it, and it does not change.
_ONEDNN = (
    torch._C._has_mkldnn
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and _is_amd_with_avx512(_processor())
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x weightᵀ + bias`` as ``torch.nn.functional.linear`` does.

    Args:
        x: ``[…, inputs]``.
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]``.
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _by_onednn(x, weight, bias)
    y: torch.Tensor = apply(_Linear, x, weight, bias)
    return y


def linear_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Write ``x weightᵀ`` into ``out``, and return it; no gradient flows through it.

    Args:
        out: ``[rows, outputs]``.
        x: ``[rows, inputs]``.
        weight: ``[outputs, inputs]``.
    """
    if not _suits(x[:_ROWS_AT_ONCE], weight):
        return torch.mm(x, weight.t(), out=out)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        out[rows] = _by_onednn(x[rows], weight, None)
    return out


def input_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``gradient weight``, the gradient by a linear layer's input.

    Args:
        gradient: by its output, ``[…, outputs]``.
        weight: ``[outputs, inputs]``.
    """
    if not _suits(gradient, weight):
        return gradient @ weight
    return _by_onednn(gradient, weight.t(), None)


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``gradientᵀ x``, the gradient by a linear layer's weight, ``[outputs, inputs]``.

    Args:
        gradient: by its output, ``[rows, outputs]``.
        x: its input, ``[rows, inputs]``.
    """
    outputs, inputs = gradient.shape[1], x.shape[1]
    if not _suits(gradient.t(), x.t()):
        return gradient.t() @ x
    # oneDNN copies the left operand, transposed: the smaller one of the two.
    if outputs <= inputs:
        return _by_onednn(gradient.t(), x.t(), None)
    return _by_onednn(x.t(), gradient.t(), None).t().contiguous()


def _suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether ``x weightᵀ`` (or ``x weight``) is one that oneDNN should do."""
    if not _ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    return (
        weight.dtype == torch.float32
        and rows >= _FEWEST_ROWS
        and rows * weight.numel() >= _SMALLEST
    )


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    function = _traced if torch.compiler.is_compiling() else _eager
    y: torch.Tensor = function(x, weight, bias)
    return y


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


# torch's own operation is one of the compiler's, for weights that are packed beforehand.
_traced = torch.library.custom_op("neomix::linear", _eager, mutates_args=())


@_traced.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            input_gradient(gradient, weight) if by_x else None,
            weight_gradient(rows, x.flatten(0, -2)) if by_weight else None,
            rows.sum(dim=0) if by_bias else None,
        )
