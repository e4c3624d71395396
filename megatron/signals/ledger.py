"""The ledger: per-domain sums of a step, accumulated on the device, reduced once.

The model's loss function hands over per-sample sums of every micro-batch; the ledger adds
them into K slots through a [K, B] matrix that says which sample is whose (a fixed order of
additions, never atomics, so that a GPU gives the same bits every time).  At the end of the step one
all-reduce of a single float64 buffer, [4K + 4] or with a reference [6K + 4], tells every rank
the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron.mixing.observation import standard_error
from megatron.monitor.overhead import Overhead

FloatArray = npt.NDArray[np.float64]

_SKIPPED, _STOP = 0, 1
_FLAGS = 4
_COLUMNS = ("loss_sum", "token_count", "square_sum", "sample_count")
_COMPARED = ("excess_sum", "reference_sum")


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Sums over the whole global batch, the same on every rank.

    Attributes:
        loss_sum: summed loss of each domain's tokens in nats, float64 [K].
        token_count: number of those tokens, float64 [K]; 0 = absent.
        square_sum: sum over samples of their squared mean losses, float64 [K].
        sample_count: samples with any such token, float64 [K].
        excess_sum: summed max(loss - reference loss, 0) of the tokens, float64 [K]; None
            without a reference.
        reference_sum: summed reference loss of the tokens, float64 [K]; None likewise.
        skipped: some rank dropped the update.
        stop: some rank was asked to stop.
    """

    loss_sum: FloatArray
    token_count: FloatArray
    square_sum: FloatArray
    sample_count: FloatArray
    excess_sum: FloatArray | None = None
    reference_sum: FloatArray | None = None
    skipped: bool
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether every domain's sum is finite."""
        return bool(np.isfinite(self.loss_sum).all())

    @property
    def mean_loss(self) -> float:
        """Mean loss over all tokens of the step, nats per token."""
        return float(self.loss_sum.sum() / max(self.token_count.sum(), 1.0))

    @property
    def domain_loss(self) -> FloatArray:
        """Mean loss of each domain, nats per token; NaN where it was absent."""
        return self.mean(self.loss_sum)

    @property
    def standard_error(self) -> FloatArray:
        """Standard error of ``domain_loss`` over its samples [K]; NaN below two of them."""
        return standard_error(self.loss_sum, self.token_count, self.square_sum, self.sample_count)

    def mean(self, total: FloatArray) -> FloatArray:
        """Return the mean over each domain's tokens of a sum [K]; NaN where it was absent."""
        absent = self.token_count == 0
        return np.where(absent, np.nan, total / np.where(absent, 1.0, self.token_count))


class Ledger:
    """Per-domain sums of the step under way.

    Args:
        domains: K, the number of domains.
        device: where the losses are.
        group: ranks to sum over (None = all).
        contributes: False on ranks that see a copy of another rank's losses (tensor
            ranks > 0); they take part in the collective with zeros.
        compared: whether micro-batches come with reference losses.
        overhead: is told what the collective costs.
    """

    def __init__(
        self,
        domains: int,
        device: torch.device,
        *,
        group: dist.ProcessGroup | None = None,
        contributes: bool = True,
        compared: bool = False,
        overhead: Overhead | None = None,
    ) -> None:
        """Allocate the buffer once; every step reuses it."""
        self._names = _COLUMNS + _COMPARED * compared
        self._domains = domains
        self._group = group
        self._contributes = contributes
        self._overhead = overhead or Overhead()
        size = len(self._names) * domains + _FLAGS
        self._buffer = torch.zeros(size, dtype=torch.float64, device=device)
        self._index = torch.arange(domains, device=device)

    def reset(self) -> None:
        """Forget what was added since the last reduction."""
        self._buffer.zero_()

    def add(
        self,
        loss_sum: torch.Tensor,
        token_count: torch.Tensor,
        domain_ids: torch.Tensor,
        *compared: torch.Tensor,
    ) -> None:
        """Add one micro-batch.

        Args:
            loss_sum: summed loss of each sample's tokens [B], nats.
            token_count: number of unmasked tokens of each sample [B].
            domain_ids: domain of each sample [B].
            *compared: summed excess over the reference, and summed reference loss, of each
                sample's tokens [B]; nothing if the ledger is not for them.
        """
        if not self._contributes:
            return
        losses, counts = loss_sum.to(torch.float64), token_count.to(torch.float64)
        present = counts > 0
        mean = losses / torch.where(present, counts, 1.0)
        wanted = compared if len(self._names) > len(_COLUMNS) else ()
        values = torch.stack(  # [C, B]
            [losses, counts, torch.where(present, mean * mean, 0.0), present.double()]
            + [part.to(torch.float64) for part in wanted]
        )
        belongs = self._index[:, None] == domain_ids[None, :]  # [K, B]
        # Selected, not multiplied by 0 and 1: 0 · NaN is NaN, and a sample that is not finite
        # must spoil its own domain only.
        selected = torch.where(belongs, values[:, None, :], 0.0)  # [C, K, B]
        self._buffer[: values.shape[0] * self._domains] += selected.sum(dim=2).flatten()

    def peek(self) -> tuple[FloatArray, FloatArray]:
        """Return summed losses and tokens [K] of the step so far, over all ranks; collective.

        A wait for the device beside that of :meth:`reduce`: for policies that must know the loss
        before the update.
        """
        seen = self._buffer[: 2 * self._domains].clone()
        if dist.is_initialized() and dist.get_world_size(self._group) > 1:
            dist.all_reduce(seen, group=self._group)
        loss_sum, token_count = seen.cpu().numpy().reshape(2, self._domains)
        return loss_sum, token_count

    def reduce(self, *, skipped: bool | torch.Tensor = False, stop: bool = False) -> StepTotals:
        """Sum over all ranks, bring the result to the host, and start afresh.

        This is the step's one collective of ours and its one device-to-host copy.

        Args:
            skipped: this rank dropped the update; a scalar (0 or 1) where only the device knows.
            stop: this rank was asked to stop.
        """
        sums = len(self._names) * self._domains
        flags = self._buffer[sums:]
        if isinstance(skipped, torch.Tensor):
            flags[_SKIPPED].copy_(skipped)
        elif skipped:
            flags[_SKIPPED] = 1.0
        if stop:
            flags[_STOP] = 1.0
        if dist.is_initialized() and dist.get_world_size(self._group) > 1:
            with self._overhead.time("collective", self._buffer.device):
                dist.all_reduce(self._buffer, group=self._group)
        host = self._buffer.cpu().numpy().copy()
        self.reset()
        columns = host[:sums].reshape(len(self._names), self._domains)
        return StepTotals(
            **dict(zip(self._names, columns, strict=True)),
            skipped=bool(host[sums + _SKIPPED] > 0),
            stop=bool(host[sums + _STOP] > 0),
        )
