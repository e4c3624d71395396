"""What a study will take: its runs, tokens, FLOPs and, where a rate is known, time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.experiments.finished import read_finish
from megatron.experiments.study import Study
from megatron.monitor.throughput import duration, short


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The size of a study, and what is left of it.

    Attributes:
        runs: different ones.
        left: of these, not finished yet.
        tokens: of all.
        tokens_left: of what is not finished.
        flops: of the training steps of all.
        flops_left: of what is not finished.
        rate: FLOPs a second of one run; None: not known.
        jobs: runs at a time.
    """

    runs: int
    left: int
    tokens: int
    tokens_left: int
    flops: float
    flops_left: float
    rate: float | None
    jobs: int

    @property
    def seconds(self) -> float | None:
        """Time for what is left; None if no rate is known."""
        if self.rate is None:
            return None
        at_once = min(self.jobs, self.left) or 1
        whole_rounds = math.ceil(self.left / at_once) * at_once / self.left if self.left else 1
        return self.flops_left / self.rate / at_once * whole_rounds

    def text(self) -> str:
        """Return it as a line for people."""
        line = (
            f"{self.runs} runs, {short(self.tokens)} tokens, {self.flops:.3g} training FLOPs; "
            f"to do: {self.left} runs, {short(self.tokens_left)} tokens, "
            f"{self.flops_left:.3g} FLOPs"
        )
        if self.seconds is None:
            return f"{line}; time not known until a run has finished (or give --rate)"
        return (
            f"{line}; about {duration(self.seconds)} at {self.rate:.3g} FLOP/s, {self.jobs} at once"
        )


def estimate(study: Study, *, jobs: int, rate: float | None = None) -> Estimate:
    """Add up a study.

    Args:
        study: the runs.
        jobs: runs at a time.
        rate: FLOPs a second of one run; measured on the finished runs of the study if None.
    """
    ends = {run.key: read_finish(run) for run in study.distinct}
    left = [run for run in study.distinct if ends[run.key] is None]
    if rate is None:
        timed = [
            (run.flops, end.seconds)
            for run in study.distinct
            if (end := ends[run.key]) is not None and end.seconds
        ]
        spent = sum(seconds for _, seconds in timed)
        rate = sum(flops for flops, _ in timed) / spent if spent else None
    return Estimate(
        runs=len(study.distinct),
        left=len(left),
        tokens=study.tokens,
        tokens_left=sum(run.tokens for run in left),
        flops=study.flops,
        flops_left=sum(run.flops for run in left),
        rate=rate,
        jobs=jobs,
    )
