"""Reading plans: this rank's micro-batches, started ahead of time where the lag allows."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.data.batch import MicroBatch
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.training.planner import Planned


class PlanReader:
    """Turns plans into micro-batches.

    Without a lag the next plan is not known while a step runs, but its windows nearly are:
    the kernel is told of those that the present weights would draw, so that the next step
    finds them in memory.

    Args:
        loader: assembles micro-batches in the background.
        sampler: knows which samples of a domain come next.
        reads: False on a pipeline stage between the first and the last, which sees neither
            tokens nor labels and reads nothing.
    """

    def __init__(self, loader: Loader, sampler: Sampler, *, reads: bool = True) -> None:
        """Start with nothing read."""
        self._loader = loader
        self._sampler = sampler
        self._reads = reads
        self._ahead: tuple[int, Iterator[MicroBatch]] | None = None

    def read(self, planned: Planned) -> Iterator[MicroBatch]:
        """Return this rank's micro-batches of a plan, from the reading ahead if it was begun."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == planned.step:
            return ahead[1]
        batches = self._begin(planned)
        if self._reads:
            self._loader.prefetch_for(self._sampler, planned.plan.weights)
        return batches

    def read_ahead(self, planned: Planned) -> None:
        """Start assembling a plan's micro-batches in the background."""
        self._ahead = (planned.step, self._begin(planned))

    def _begin(self, planned: Planned) -> Iterator[MicroBatch]:
        if not self._reads:
            return iter(())
        return self._loader.load(planned.plan, planned.decision.loss_weights)
