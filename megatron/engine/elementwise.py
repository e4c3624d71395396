"""Optimizers whose every number is updated by itself: Lion and MADGRAD.

ZeRO hands an optimizer flat pieces of many parameters; for these that makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, algorithm 2), with decoupled decay."""

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameter groups.

        Args:
            groups: of parameters; each may have its own ``weight_decay``.
            lr: learning rate; each number moves by this much.
            betas: shares of the momentum in the update, and in the next momentum.
            weight_decay: of groups that have none of their own.
        """
        super().__init__(
            [dict(group) for group in groups],
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group, parameter, gradient in with_gradients(self, closure):
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            momentum, (first, second) = state["exp_avg"], group["betas"]
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            update = momentum.mul(first).add_(gradient, alpha=1.0 - first).sign_()
            parameter.add_(update, alpha=-group["lr"])
            momentum.mul_(second).add_(gradient, alpha=1.0 - second)
        return None


class Madgrad(Optimizer):
    """Momentumised dual averaging (Defazio & Jelassi 2022, algorithm 1), with decoupled decay.

    GPT-NeoX's ``madgrad_wd``: weights shrink by (lr + eps) · decay before the step, and ``eps``
    is added to the learning rate.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameter groups.

        Args:
            groups: of parameters; each may have its own ``weight_decay``.
            lr: learning rate.
            momentum: share of the weights in their average with the dual iterate.
            eps: added to the cube root of the sum of squares.
            weight_decay: of groups that have none of their own.
        """
        super().__init__(
            [dict(group) for group in groups],
            {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group, parameter, gradient in with_gradients(self, closure):
            state, momentum, eps = self.state[parameter], group["momentum"], group["eps"]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["grad_sum_sq"] = torch.zeros_like(parameter)
                state["s"] = torch.zeros_like(parameter)
                if momentum > 0:
                    state["x0"] = parameter.clone()
            rate = group["lr"] + eps
            squares, total = state["grad_sum_sq"], state["s"]
            weight = rate * float(state["step"] + 1) ** 0.5
            parameter.mul_(1.0 - rate * group["weight_decay"])
            # Without momentum the start is worked out from the other quantities.
            start = (
                state["x0"]
                if momentum > 0
                else parameter.addcdiv(total, squares.pow(1 / 3).add_(eps))
            )
            squares.addcmul_(gradient, gradient, value=weight)
            total.add_(gradient, alpha=weight)
            dual = start.addcdiv(total, squares.pow(1 / 3).add_(eps), value=-1.0)
            parameter.mul_(momentum).add_(dual, alpha=1.0 - momentum)
            state["step"] += 1
        return None


def with_gradients(
    optimizer: Optimizer, closure: Callable[[], float] | None
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Yield (group, parameter, gradient) for every parameter that has a gradient.

    Raises:
        ValueError: a closure is given, which nothing here needs.
    """
    if closure is not None:
        raise ValueError("closures are not supported")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter, parameter.grad
