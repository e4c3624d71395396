"""Schedule: a mixture that changes by plan, not by what is observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.base import Decision, Mixer, RunContext
from megatron.mixing.observation import FloatArray, Signal
from megatron.mixing.options import CommonOptions
from megatron.mixing.replay import Ledger, read_ledger
from megatron.mixing.simplex import normalise
from megatron.mixing.stages import read_stages
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(CommonOptions):
    """Options of ``schedule``; with none of them the given weights hold throughout.

    Raises:
        ConfigError: both stages and a replay, or an average of nothing.
    """

    stages: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "the stages in order, each with weights (by domain name, or 'given' or "
            "'uniform') and a duration: steps, tokens (such as '2B') or fraction (of the run); "
            "the last may leave the duration out"
        },
    )
    interpolation: Literal["step", "linear"] = field(
        default="step",
        metadata={
            "help": "hold each stage's weights until the next starts (step), or move from each "
            "stage's weights at its start to the next one's at its end (linear)"
        },
    )
    replay: str | None = field(
        default=None,
        metadata={
            "help": "the mixture.jsonl of a run, or the run's folder, whose decisions (sampling "
            "and loss weights) are repeated step by step; the last one holds after its end"
        },
    )
    replay_average: bool = field(
        default=False,
        metadata={"help": "draw every step from the mean of the replayed distributions"},
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        super().__post_init__()
        if self.stages is not None and self.replay is not None:
            raise ConfigError("stages and replay exclude each other; give one of them")
        if self.replay_average and self.replay is None:
            raise ConfigError("replay_average is true without replay; name the ledger in replay")
        if self.interpolation != "step" and self.stages is None:
            raise ConfigError(f"interpolation is {self.interpolation!r} without stages; give them")


class Schedule(Mixer):
    """Weights as a function of the step alone.

    ``update_every`` m refreshes them at steps 1, m + 1, 2m + 1, …; ``warmup_steps``
    draws the first steps from the given weights (the plan's own clock runs on).
    """

    method = "schedule"
    needs: frozenset[Signal] = frozenset()

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: ScheduleOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._interpolation = options.interpolation
        given = normalise(weights)
        self._ledger: Ledger | None = None
        self._starts: npt.NDArray[np.int64]
        self._table: npt.NDArray[np.float64]  # [stages, K]
        if options.replay is not None:
            ledger = read_ledger(options.replay, self.domains)
            if options.replay_average:
                self._starts, self._table = np.ones(1, np.int64), ledger.average()[None]
            else:
                self._ledger = ledger
                self._starts, self._table = ledger.steps, ledger.probability
        elif options.stages is not None:
            try:
                stages = read_stages(
                    options.stages, domains=self.domains, given=given, context=context
                )
            except ConfigError as error:
                raise ConfigError(f"mixing method 'schedule': {error}") from error
            self._starts = np.array([stage.start for stage in stages], dtype=np.int64)
            self._table = np.stack([stage.weights for stage in stages])
        else:
            self._starts, self._table = np.ones(1, np.int64), given[None]

    def _update(self, step: int, window: Window) -> FloatArray | None:
        return None

    def _decide(self, step: int) -> Decision:
        every = self._options.update_every
        refreshed = (step - 1) // every * every + 1
        weights = self._bounded(self._plan(refreshed)).copy()
        if self._ledger is None:
            return Decision(sampling_weights=weights)
        loss_weights = self._ledger.loss_weight.get(int(self._starts[self._row(step)]))
        return Decision(
            sampling_weights=weights,
            loss_weights=None if loss_weights is None else loss_weights.copy(),
            fresh_quota=self._ledger.fresh_quota.get(step),
            probe=self._ledger.probe.get(step),
        )

    def _plan(self, step: int) -> FloatArray:
        """Return the planned distribution of ``step``; the first and the last hold outside."""
        row = self._row(step)
        here: FloatArray = self._table[row]
        if self._interpolation == "step" or row + 1 == len(self._starts):
            return here
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        share = (step - start) / (end - start)
        following: FloatArray = self._table[row + 1]
        return (1.0 - share) * here + share * following

    def _row(self, step: int) -> int:
        """Return the row in force at ``step``: the last that has started by then, or the first."""
        return max(int(np.searchsorted(self._starts, step, side="right")) - 1, 0)
