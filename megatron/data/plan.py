"""What one step reads: the domain and the sample in every slot of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.errors import NeomixError


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The samples of one step, the same on every rank.

    Slot j = (micro · data_size + data_rank) · B + row of the global batch is row ``row`` of
    micro-batch ``micro`` on data-parallel rank ``data_rank``; so the ordered global list does
    not depend on how it is divided.

    Attributes:
        step: the step.
        domain: [G] int32, index of the domain.
        epoch: [G] int64, pass over that domain, from 0.
        sample: [G] int64, position in the shuffled order of that pass.
        weights: [K] float64, the distribution that drew the step (sum 1; domains that were
            dropped have 0).
    """

    step: int
    domain: NDArray[np.int32]
    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]
    weights: NDArray[np.float64]

    def counts(self) -> NDArray[np.int64]:
        """Return the number of samples per domain, [K]."""
        return np.bincount(self.domain, minlength=self.weights.size).astype(np.int64)

    def slots(
        self, micro_batch: int, accumulation: int, data_rank: int, data_size: int
    ) -> NDArray[np.int64]:
        """Return the slots [accumulation, B] of one data-parallel rank, in order of use."""
        expected = micro_batch * accumulation * data_size
        if self.domain.size != expected:
            raise ValueError(
                f"a plan of {self.domain.size} samples does not divide into micro-batch "
                f"{micro_batch} × accumulation {accumulation} × data ranks {data_size}"
            )
        grid = np.arange(expected).reshape(accumulation, data_size, micro_batch)
        return grid[:, data_rank, :]

    def sample_ids(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        """Return the ordered global list of (domain name, epoch, sample)."""
        return [
            (names[domain], epoch, sample)
            for domain, epoch, sample in zip(
                self.domain.tolist(), self.epoch.tolist(), self.sample.tolist(), strict=True
            )
        ]


class EndOfData(NeomixError):  # noqa: N818 - how a run ends, not that it went wrong
    """A step asks for samples that the domains no longer have; the run ends before it.

    Raised under ``on_exhausted: stop`` for the first domain that would be exceeded, and under
    ``drop`` when every domain of positive weight is used up.  The sampler is as before the step.

    Attributes:
        step: the step that could not be planned.
        domains: names of the domains that are exhausted.
    """

    exit_code = 0

    def __init__(self, step: int, domains: Sequence[str]) -> None:
        """Name the step and the exhausted domains."""
        self.step = step
        self.domains = tuple(domains)
        super().__init__(
            f"end of data before step {step}: {', '.join(self.domains)} exhausted "
            "(set mixing.on_exhausted to 'repeat' to start another epoch)"
        )
