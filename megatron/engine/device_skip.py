"""Leaving out an update that is not finite without asking the device whether it is.

DeepSpeed brings the gradient's norm to the host before each update (with clipping once more for
every group of parameters, in bf16 after a further pass over all gradients), and goes on when it
has seen a number.  Here the norm stays where it is: torch's fused optimizers look at a flag on the
device and leave weights, moments and their count of steps alone where it is set.  What came of it
travels with the ledger's buffer, the step's one copy to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron.engine.fragments import is_resident, is_resident_stage_3


class DeviceSkip:
    """Decides on the device whether a step's update takes place.

    Attributes:
        flag: 1 where the last step's gradient was not finite, else 0; float32 scalar on the
            device, the same on all ranks that share a norm.
    """

    def __init__(self, optimizer: Any) -> None:
        """Take over the decision from DeepSpeed's optimizer, which :func:`applies` is true of."""
        self._inner = optimizer.optimizer
        self.flag: torch.Tensor | None = None
        if is_resident_stage_3(optimizer):
            self._groups: Callable[[], list[torch.Tensor]] = optimizer._get_norm_groups
            _combine_unseen()
            optimizer._get_norm_groups = lambda: _UnseenGroups([self._whole_norm()])
            return
        self._norm: Callable[..., torch.Tensor] = optimizer.scaled_global_norm
        # Where a gradient is not finite, the norm is not either: one pass over them is enough.
        optimizer.check_grad_overflow = False
        optimizer.scaled_global_norm = self._scaled_global_norm

    def _scaled_global_norm(self, *arguments: Any, **named: Any) -> _UnseenNorm:
        return self._unseen(self._norm(*arguments, **named))

    def _whole_norm(self) -> _UnseenNorm:
        """Return the norm of all sub-groups of ZeRO 3."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return self._unseen(combine_grad_norm_groups(self._groups()))

    def _unseen(self, norm: torch.Tensor) -> _UnseenNorm:
        self.flag = (~torch.isfinite(norm) | (norm < 0)).float()
        self._inner.found_inf = self.flag
        return _UnseenNorm(norm)


def applies(optimizer: Any) -> bool:
    """Return whether a step of DeepSpeed's optimizer can be left out on the device.

    It can with ZeRO 1 to 3 around a fused Adam that is not offloaded, in fp32 and bf16.  In fp16
    the host moves the loss scale, and has to know.
    """
    inner = getattr(optimizer, "optimizer", None)
    return (
        ((is_resident(optimizer) and optimizer.compute_grad_norm) or is_resident_stage_3(optimizer))
        and isinstance(inner, torch.optim.Adam)  # AdamW is one
        and all(group["fused"] for group in inner.param_groups)
        and optimizer.dtype in (torch.float32, torch.bfloat16)
    )


def _combine_unseen() -> None:
    """Let ZeRO 3 take a norm that is not seen for what its sub-groups' norms come to."""
    from deepspeed.runtime.zero import stage3

    theirs = stage3.combine_grad_norm_groups
    if getattr(theirs, "_takes_unseen", False):
        return

    def combine(groups: Iterable[Any], *arguments: Any, **named: Any) -> Any:
        return (
            groups[0] if isinstance(groups, _UnseenGroups) else theirs(groups, *arguments, **named)
        )

    combine._takes_unseen = True  # type: ignore[attr-defined]
    stage3.combine_grad_norm_groups = combine


class _UnseenGroups(list["_UnseenNorm"]):
    """The one norm of all sub-groups."""


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
