"""Leaving out an update that is not finite without asking the device whether it is.

DeepSpeed brings the gradient's norm to the host before each update (with clipping once more for
every group of parameters, in bf16 after a further pass over all gradients), and goes on when it
has seen a number.  Here the norm stays where it is: torch's fused optimizers look at a flag on the
device and leave weights, moments and their count of steps alone where it is set.  What came of it
travels with the ledger's buffer, the step's one copy to the host.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.engine.fragments import is_resident


class DeviceSkip:
    """Decides on the device whether a step's update takes place.

    Attributes:
        flag: 1 where the last step's gradient was not finite, else 0; float32 scalar on the
            device, the same on all ranks that share a norm.
    """

    def __init__(self, optimizer: Any) -> None:
        """Take over the decision from DeepSpeed's optimizer, which :func:`applies` is true of."""
        self._inner = optimizer.optimizer
        self._norm = optimizer.scaled_global_norm
        self.flag: torch.Tensor | None = None
        # Where a gradient is not finite, the norm is not either: one pass over them is enough.
        optimizer.check_grad_overflow = False
        optimizer.scaled_global_norm = self._scaled_global_norm

    def _scaled_global_norm(self, *arguments: Any, **named: Any) -> _UnseenNorm:
        norm: torch.Tensor = self._norm(*arguments, **named)
        self.flag = (~torch.isfinite(norm) | (norm < 0)).float()
        self._inner.found_inf = self.flag
        return _UnseenNorm(norm)


def applies(optimizer: Any) -> bool:
    """Return whether a step of DeepSpeed's optimizer can be left out on the device.

    It can with ZeRO 1 and 2 around a fused Adam that is not offloaded, in fp32 and bf16.  In fp16
    the host moves the loss scale, and has to know.
    """
    inner = getattr(optimizer, "optimizer", None)
    return (
        is_resident(optimizer)
        and isinstance(inner, torch.optim.Adam)  # AdamW is one
        and all(group["fused"] for group in inner.param_groups)
        and optimizer.dtype in (torch.float32, torch.bfloat16)
        and optimizer.compute_grad_norm
    )


class _UnseenNorm:
    """A norm on the device that passes for a valid number on the host."""

    def __init__(self, norm: torch.Tensor) -> None:
        self._norm = norm

    def __float__(self) -> float:
        return 0.0

    def __lt__(self, other: float) -> bool:
        return False

    def __truediv__(self, scale: float) -> torch.Tensor:
        return self._norm / scale
