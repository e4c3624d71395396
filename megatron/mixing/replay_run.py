"""Replay: another run's decisions, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from megatron.errors import ConfigError
from megatron.mixing.base import RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions
from megatron.mixing.schedule import Schedule, ScheduleOptions


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(CommonOptions):
    """Options of ``replay`` and ``average_of_ledger``; they need ``ledger``."""

    ledger: str | None = field(
        default=None,
        metadata={"help": "the mixture.jsonl of a run, or the run's folder"},
    )


class Replay(Schedule):
    """What another run drew from: the same bits at every step, and loss weights and probes too.

    The ledger's last decision holds after its end.
    """

    method = "replay"
    takes_groups: ClassVar[bool] = False
    """Its decisions are about domains, as they were recorded."""
    _average = False

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
            options=as_schedule(options, self.method, average=self._average),
            context=context,
        )


def as_schedule(options: ReplayOptions, method: str, *, average: bool) -> ScheduleOptions:
    """Return the options of the schedule that does it.

    Raises:
        ConfigError: no ledger was named.
    """
    if options.ledger is None:
        raise ConfigError(
            f"mixing method '{method}': no ledger; give the mixture.jsonl of a run, or its folder"
        )
    common: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(CommonOptions)}
    return ScheduleOptions(**common, replay=options.ledger, replay_average=average)
