"""What a run reports, and where it goes: records, sinks, throughput, the report.

The training loop on rank 0 builds a :class:`SinkGroup` with :func:`build_sinks`
and hands it records; nothing here decides anything about the run.
"""

from megatron.monitor.build import build_sinks
from megatron.monitor.record import (
    TIME_FIELDS,
    AuditRecord,
    StepRecord,
    ValidationRecord,
    is_logged,
)
from megatron.monitor.sink import Sink, SinkGroup
from megatron.monitor.throughput import Throughput

__all__ = [
    "TIME_FIELDS",
    "AuditRecord",
    "Sink",
    "SinkGroup",
    "StepRecord",
    "Throughput",
    "ValidationRecord",
    "build_sinks",
    "is_logged",
]
