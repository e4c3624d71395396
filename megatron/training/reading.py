"""Reading plans: this rank's micro-batches, started ahead of time where the lag allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron.data.batch import MicroBatch
from megatron.data.loader import Loader
from megatron.errors import DataError
from megatron.training.planner import Planned


class PlanReader:
    """Turns plans into micro-batches.

    Args:
        loader: assembles micro-batches in the background.
        vocab_size: rows of the embedding; a token id beyond is refused before the model
            would fail on it.
        domains: names, for the message.
    """

    def __init__(self, loader: Loader, *, vocab_size: int, domains: Sequence[str]) -> None:
        """Start with nothing read."""
        self._loader = loader
        self._vocab_size = vocab_size
        self._domains = domains
        self._started: tuple[int, Iterator[MicroBatch]] | None = None

    def read(self, planned: Planned) -> Iterator[MicroBatch]:
        """Return this rank's micro-batches of a plan, from the reading ahead if it was begun."""
        started, self._started = self._started, None
        if started is not None and started[0] == planned.step:
            return self._checked(started[1])
        return self._checked(self._begin(planned))

    def read_ahead(self, planned: Planned) -> None:
        """Start assembling a plan's micro-batches in the background."""
        self._started = (planned.step, self._begin(planned))

    def _begin(self, planned: Planned) -> Iterator[MicroBatch]:
        return self._loader.load(planned.plan, planned.decision.loss_weights)

    def _checked(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            highest = int(max(batch.tokens.max(), batch.targets.max()))
            if highest >= self._vocab_size:
                ids = np.maximum(batch.tokens, batch.targets)
                row = int(ids.max(axis=1).argmax())
                raise DataError(
                    f"domain '{self._domains[int(batch.domain_ids[row])]}' holds the token id "
                    f"{highest}, but the vocabulary has {self._vocab_size} ids; set vocab_size, "
                    "or tokenise the data with the tokenizer of this run"
                )
            yield batch
