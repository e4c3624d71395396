"""Held-out sums, one place per window: from them come the losses by domain and their errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """One measurement of held-out windows, the same on every rank.

    Attributes:
        loss_sum: summed loss of each window's tokens in nats, float64 [N].
        token_count: number of those tokens, float64 [N].
        window_domain: whose window it is, int64 [N].
        domains: number of domains; some may have no window.
    """

    loss_sum: FloatArray
    token_count: FloatArray
    window_domain: IntArray
    domains: int

    @property
    def loss(self) -> FloatArray:
        """Mean loss of each domain over its tokens, nats per token; NaN without windows."""
        tokens = self._by_domain(self.token_count)
        absent = tokens == 0
        mean = self._by_domain(self.loss_sum) / np.where(absent, 1.0, tokens)
        return np.where(absent, np.nan, mean)

    @property
    def window_loss(self) -> FloatArray:
        """Mean loss of each window, nats per token, [N]; NaN where all is masked."""
        absent = self.token_count == 0
        return np.where(absent, np.nan, self.loss_sum / np.where(absent, 1.0, self.token_count))

    @property
    def tokens(self) -> int:
        """Tokens that were measured."""
        return int(self.token_count.sum())

    def _by_domain(self, values: FloatArray) -> FloatArray:
        sums = np.bincount(self.window_domain, weights=values, minlength=self.domains)
        return sums.astype(np.float64)


class WindowSums:
    """Sums by window of the measurement under way.

    A window is seen by one data rank, once; padding adds zeros wherever it falls.  So each
    place gets one number that is not zero, and the order of additions decides nothing.

    Args:
        windows: N, over all domains.
        device: where the losses are.
        contributes: False on ranks that see a copy of another rank's losses; they take part
            in the collective with zeros.
    """

    def __init__(self, windows: int, device: torch.device, *, contributes: bool = True) -> None:
        """Allocate the buffer."""
        self._contributes = contributes
        self._buffer = torch.zeros(2, windows, dtype=torch.float64, device=device)

    def add(
        self,
        loss_sum: torch.Tensor,
        token_count: torch.Tensor,
        window: torch.Tensor,
        *compared: torch.Tensor,
    ) -> None:
        """Add one micro-batch: sums, counts and windows' numbers, each [B]."""
        if not self._contributes:
            return
        present = token_count > 0
        losses = torch.where(present, loss_sum.to(torch.float64), 0.0)
        values = torch.stack([losses, token_count.to(torch.float64)])
        self._buffer.index_add_(1, window, values)

    def reduce(self) -> tuple[FloatArray, FloatArray]:
        """Sum over all ranks; return loss sums and token counts [N]."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._buffer)
        loss_sum, token_count = self._buffer.cpu().numpy().copy()
        return loss_sum, token_count
