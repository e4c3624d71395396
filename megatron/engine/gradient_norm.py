"""The norm of a gradient in float64, without a copy of the gradient in float64.

DeepSpeed (ZeRO 1 and 2) writes every gradient out in float64 to take its norm: four times a bf16
gradient's memory, and on a CPU more time than the optimizer needs.  Here blocks that stay in the
cache are widened one after the other.  The sum is as exact, and is rounded to float32 as
DeepSpeed rounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.fragments import is_resident

_BLOCK = 1 << 18  # elements: 2 MiB in float64


class GradientNorm:
    """Stands where ``get_grad_norm_direct`` of DeepSpeed's optimizer was."""

    def __init__(self, optimizer: Any) -> None:
        """Replace the optimizer's own."""
        self._optimizer = optimizer
        self._theirs = optimizer.get_grad_norm_direct
        optimizer.get_grad_norm_direct = self

    def __call__(
        self,
        gradients: Iterable[torch.Tensor],
        parameters: Sequence[torch.nn.Parameter],
        norm_type: float = 2,
    ) -> torch.Tensor:
        """Return the norm over all ranks, float32; -1 where it is not finite.

        Args:
            gradients: this rank's parts, with paddings among them.
            parameters: that they belong to, paddings left out.
            norm_type: 2; anything else is left to DeepSpeed.
        """
        optimizer = self._optimizer
        if norm_type != 2:
            other: torch.Tensor = self._theirs(gradients, parameters, norm_type)
            return other
        parts = (part for part in gradients if not getattr(part, "_zero_padding", False))
        squares = [
            _square(part)
            for part, parameter in zip(parts, parameters, strict=False)
            if self._counts(parameter)
        ]
        device = optimizer.device if not squares else squares[0].device
        total = torch.stack(squares).sum().float() if squares else torch.zeros((), device=device)
        dist.all_reduce(total, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def _counts(self, parameter: torch.nn.Parameter) -> bool:
        """Tell whether this rank adds a parameter: of what several hold alike, one does."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        divided = getattr(parameter, "model_parallel", False) or getattr(
            parameter, "tensor_model_parallel", False
        )
        return bool(divided) or self._optimizer.model_parallel_rank == 0


def take_norms(optimizer: Any) -> bool:
    """Take the norms of an optimizer of DeepSpeed's ZeRO 1 or 2; return whether it is one."""
    if not is_resident(optimizer):
        return False
    GradientNorm(optimizer)
    return True


def _square(part: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's squares, float64."""
    flat = part.detach().reshape(-1)
    if flat.device.type != "cpu":
        norm: torch.Tensor = torch.linalg.vector_norm(flat, dtype=torch.float64)
        return norm * norm
    wide = torch.empty(min(_BLOCK, flat.numel()), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        widened = wide[: block.numel()].copy_(block)
        total += torch.dot(widened, widened)
    return total
