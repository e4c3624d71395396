"""Average of a ledger: the mixture that another run had on average, held throughout."""

from __future__ import annotations

from megatron.mixing.replay_run import Replay


class AverageOfLedger(Replay):
    """The mean of the distributions that another run drew from, at every step.

    It tells whether a method's adaptivity helped, or the mixture that it had on average.
    """

    method = "average_of_ledger"
    _average = True
