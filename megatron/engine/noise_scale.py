"""The simple gradient noise scale (McCandlish et al. 2018, appendix A.1).

With a gradient of b samples and one of B > b,

    |G|² ≈ (B |G_B|² - b |G_b|²) / (B - b)
    tr Σ ≈ (|G_b|² - |G_B|²) / (1/b - 1/B)

and the noise scale, the batch size from which on larger batches gain little, is tr Σ / |G|².
Here b is a micro-batch and B the whole batch, so that no pass is added: squares are summed as
each micro-batch's gradients come by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron.engine.observer import StepOutcome

NOISE_SCALE = "noise_scale"


@dataclass
class _Seen:
    """One step: this rank's sum of squares, the loss scale, and the whole gradient's norm."""

    scale: float
    squares: list[torch.Tensor] = field(default_factory=list)
    norm: float | torch.Tensor | None = None


class GradientNoiseScale:
    """Estimates the noise scale; see :class:`megatron.engine.observer.StepObserver`."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        micro: int,
        total: int,
        accumulation: int,
        steps: int,
        log_interval: int,
        logged: Callable[[int], bool],
        device: torch.device,
    ) -> None:
        """Hook into the parameters' gradients.

        Args:
            parameters: those that this rank counts (of what tensor ranks hold alike, one does).
            micro: samples of a micro-batch.
            total: samples of the whole batch, more than ``micro``.
            accumulation: micro-batches of a rank and step.
            steps: steps that are averaged over.
            log_interval: steps between two logged ones.
            logged: whether a step's estimate is wanted.
            device: where the ranks' sums are added.
        """
        self._micro, self._total, self._accumulation = micro, total, accumulation
        self._interval, self._logged, self._device = log_interval, logged, device
        self._seen: deque[_Seen] = deque(maxlen=steps)
        self._current: _Seen | None = None
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Watch the step if a logged one is near enough to need it."""
        ahead = -step % self._interval
        near = self._logged(step) or ahead < (self._seen.maxlen or 1)
        self._current = _Seen(scale=loss_scale) if near else None

    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Return the estimate on a logged step; nothing where the gradient's norm is not known."""
        current, self._current = self._current, None
        if current is not None and not outcome.skipped and outcome.grad_norm is not None:
            current.norm = outcome.grad_norm
            self._seen.append(current)
        if not self._logged(step) or not self._seen:
            return {}
        value = self._estimate()
        return {} if value is None else {NOISE_SCALE: value}

    def _add(self, gradient: torch.Tensor) -> None:
        if self._current is not None:
            # The square of a norm in fp16 overflows where the norm does not.
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._current.squares.append(norm.double().square())

    def _estimate(self) -> float | None:
        """Return tr Σ / |G|² over the steps that were seen, averaged apart; collective."""
        own = [
            float(torch.stack(one.squares).sum()) / one.scale**2 if one.squares else 0.0
            for one in self._seen
        ]
        sums = torch.tensor(own, dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        gradient = noise = 0.0
        # DeepSpeed divides each micro-batch's loss by the accumulation.
        per_gradient = self._accumulation**2 * self._micro / self._total
        for one, total in zip(self._seen, sums.tolist(), strict=True):
            assert one.norm is not None
            signal, trace = noise_and_signal(
                total * per_gradient, float(one.norm) ** 2, self._micro, self._total
            )
            gradient, noise = gradient + signal, noise + trace
        return noise / gradient if gradient > 0 and math.isfinite(noise / gradient) else None


def noise_and_signal(small: float, big: float, micro: int, total: int) -> tuple[float, float]:
    """Return the unbiased estimates of |G|² and tr Σ.

    Args:
        small: mean |G_b|² of gradients of ``micro`` samples.
        big: |G_B|² of the gradient of ``total`` samples.
        micro: b.
        total: B.
    """
    signal = (total * big - micro * small) / (total - micro)
    trace = (small - big) / (1.0 / micro - 1.0 / total)
    return signal, trace
