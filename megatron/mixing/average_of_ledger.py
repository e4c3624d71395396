"""Average of a ledger: the mixture that another run had on average, held throughout."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.mixing.base import RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.replay_run import ReplayOptions, as_schedule
from megatron.mixing.schedule import Schedule


class AverageOfLedger(Schedule):
    """The mean of the distributions that another run drew from, at every step.

    It tells whether a method's adaptivity helped, or the mixture that it had on average.
    """

    method = "average_of_ledger"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: ReplayOptions,
        context: RunContext,
    ) -> None:
        super().__init__(
            domains=domains,
            weights=weights,
            options=as_schedule(options, self.method, average=True),
            context=context,
        )
