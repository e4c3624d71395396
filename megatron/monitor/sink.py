"""The contract of everything that shows or stores a run's records."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from megatron.errors import NeomixError
from megatron.monitor.record import AuditRecord, StepRecord, TaskRecord, ValidationRecord

_log = logging.getLogger(__name__)


@runtime_checkable
class Sink(Protocol):
    """Takes records on rank 0.

    Calls come in this order: ``start`` once, then records with rising steps and
    ``flush`` before a checkpoint counts, then ``close``.
    """

    essential: bool
    """Whether the run must stop when this sink fails (the ledger) or may go on without it."""

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Open for a new run (``None``) or one that goes on after ``resume_step``.

        ``info`` describes the run; known keys are listed in ``docs/report.md``.
        """
        ...

    def step(self, record: StepRecord) -> None:
        """Take a training step."""
        ...

    def validation(self, record: ValidationRecord) -> None:
        """Take a measurement of held-out losses."""
        ...

    def tasks(self, record: TaskRecord) -> None:
        """Take an evaluation by tasks."""
        ...

    def audit(self, record: AuditRecord) -> None:
        """Take the list of samples of a step."""
        ...

    def flush(self) -> None:
        """Return when everything taken so far would survive the death of this process."""
        ...

    def close(self) -> None:
        """Flush and let go; may be called twice."""
        ...


class SinkGroup:
    """Several sinks as one.

    An essential sink's error ends the run.  Any other sink that fails after its
    start is dropped with one warning: a lost network connection costs a chart,
    not a training run.
    """

    essential = True

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        """Group ``sinks``; an empty group (every rank but the first) does nothing."""
        self._sinks = list(sinks)

    def __iter__(self) -> Iterator[Sink]:
        """Iterate over the sinks still in use."""
        return iter(self._sinks)

    def __len__(self) -> int:
        """Count the sinks still in use."""
        return len(self._sinks)

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Start every sink; any failure here is an error of the configuration and is raised."""
        for sink in self._sinks:
            sink.start(resume_step, info)

    def step(self, record: StepRecord) -> None:
        """Hand a step to every sink."""
        self._each("step", record)

    def validation(self, record: ValidationRecord) -> None:
        """Hand a validation to every sink."""
        self._each("validation", record)

    def tasks(self, record: TaskRecord) -> None:
        """Hand an evaluation by tasks to every sink."""
        self._each("tasks", record)

    def audit(self, record: AuditRecord) -> None:
        """Hand a plan's samples to every sink."""
        self._each("audit", record)

    def flush(self) -> None:
        """Flush every sink."""
        self._each("flush")

    def close(self) -> None:
        """Close every sink, even when one fails; the first essential failure is raised."""
        failure: BaseException | None = None
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                if sink.essential:
                    failure = failure or error
                else:
                    _log.warning("%s could not be closed: %s", type(sink).__name__, error)
        self._sinks = []
        if failure is not None:
            raise failure

    def _each(self, method: str, *arguments: Any) -> None:
        for sink in tuple(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                if sink.essential or isinstance(error, NeomixError):
                    raise
                self._sinks.remove(sink)
                _log.warning(
                    "%s failed and is off for the rest of this run: %s: %s",
                    type(sink).__name__,
                    type(error).__name__,
                    error,
                )
