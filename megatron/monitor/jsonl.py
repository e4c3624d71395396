"""The run's own files: ``metrics.jsonl``, ``mixture.jsonl``, ``samples.jsonl``, ``run.json``.

``mixture.jsonl`` is the ledger that a run can be replayed from; its field names
are a public contract (``docs/report.md``).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import RunError
from megatron.monitor.append import AppendFile
from megatron.monitor.charts import perplexity, validation_scalars
from megatron.monitor.encode import VectorEncoder, dumps, named, number
from megatron.monitor.record import (
    LEDGER_VECTORS,
    METRICS_VECTORS,
    AuditRecord,
    StepRecord,
    TaskRecord,
    ValidationRecord,
    is_logged,
)

METRICS = "metrics.jsonl"
MIXTURE = "mixture.jsonl"
SAMPLES = "samples.jsonl"
RUN_INFO = "run.json"
EVALUATIONS = "evaluations.jsonl"
"""What ``evaluate.py`` measured of the run's checkpoints: lines like those of the metrics."""
ALL_STEPS = "all"
"""Key of the whole training time beside the kinds of overhead in ``metrics.jsonl``."""

# What is measured between two steps: its field of a line, and its kind.
_MEASURED = {"valid_loss": "valid", "test_loss": "test", "tasks": "tasks"}
_AVERAGE = re.compile(r"/(weighted_)?avg_")

_log = logging.getLogger(__name__)


class JsonlSink:
    """Writes the files of the run folder."""

    essential = True

    def __init__(self, run_dir: Path | str, *, log_interval: int = 1, audit: bool = False) -> None:
        """Write into ``run_dir``; ``samples.jsonl`` only with ``audit``."""
        self._dir = Path(run_dir)
        self._log_interval = log_interval
        self._metrics = AppendFile(self._dir / METRICS)
        self._mixture = AppendFile(self._dir / MIXTURE)
        self._samples = AppendFile(self._dir / SAMPLES) if audit else None
        self._encoders: dict[str, VectorEncoder] = {}
        self._domains: tuple[str, ...] = ()
        self._last_step = 0
        self._last_audit = 0
        self._overhead: dict[str, float] = {}
        self._validated: set[tuple[int, str]] = set()

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Open the files, cut after ``resume_step``; write ``info`` to ``run.json``.

        Raises:
            RunError: a file cannot be opened.
        """
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self._dir}: cannot be made: {error.strerror}") from error
        metrics = self._metrics.open(resume_step)
        mixture = self._mixture.open(resume_step)
        if self._samples is not None:
            self._samples.open(resume_step)
        elif (self._dir / SAMPLES).exists():
            # Auditing was on before: no sample of a step that is run again may stay.
            stale = AppendFile(self._dir / SAMPLES)
            stale.open(resume_step)
            stale.close()
        self._last_step = self._last_audit = resume_step or 0
        # A run that stopped right after a validation measures it again on resume.
        self._validated = {
            (resume_step, kind)
            for record in metrics.at_last
            if resume_step is not None and metrics.last_step == resume_step
            for name, kind in _MEASURED.items()
            if name in record
        }
        if resume_step and (mixture.last_step or 0) < resume_step:
            _log.warning(
                "%s ends at step %s but the run goes on after step %d: the steps between are "
                "missing from the ledger",
                self._dir / MIXTURE,
                mixture.last_step or 0,
                resume_step,
            )
        # The configuration has a file of its own, and counts so far are in the ledger.
        facts = {key: info[key] for key in info if key not in ("config", "samples_seen")}
        if facts:
            self._write_info(facts)

    def step(self, record: StepRecord) -> None:
        """Write the ledger's line, and the metrics' line on a logged step."""
        if record.step <= self._last_step:
            raise ValueError(
                f"step {record.step} is recorded after step {self._last_step}: "
                "a step has one line in the ledger"
            )
        self._last_step = record.step
        self._mixture.write(self._mixture_line(record))
        for kind, seconds in {ALL_STEPS: record.seconds or 0.0, **record.overhead}.items():
            self._overhead[kind] = self._overhead.get(kind, 0.0) + seconds
        if is_logged(record.step, self._log_interval):
            self._metrics.write(metrics_line(record, self._overhead))
            self._overhead = {}

    def validation(self, record: ValidationRecord) -> None:
        """Write a validation, unless the same one stands there already."""
        if self._is_new(record.step, record.split):
            self._metrics.write(validation_line(record))

    def tasks(self, record: TaskRecord) -> None:
        """Write an evaluation by tasks, unless the same one stands there already."""
        if self._is_new(record.step, "tasks"):
            self._metrics.write(tasks_line(record))

    def _is_new(self, step: int, kind: str) -> bool:
        new = (step, kind) not in self._validated
        self._validated = {kept for kept in self._validated if kept[0] == step} | {(step, kind)}
        return new

    def audit(self, record: AuditRecord) -> None:
        """Write the samples of a step, if auditing is on."""
        if self._samples is None:
            return
        if record.step <= self._last_audit:
            raise ValueError(
                f"samples of step {record.step} come after those of step {self._last_audit}"
            )
        self._last_audit = record.step
        self._samples.write(dumps({"step": record.step, "samples": record.samples}))

    def flush(self) -> None:
        """Bring every line to the disk."""
        for file in self._files():
            file.flush(sync=True)

    def close(self) -> None:
        """Flush and close the files."""
        for file in self._files():
            file.close()

    def _files(self) -> list[AppendFile]:
        files = [self._metrics, self._mixture]
        return files if self._samples is None else [*files, self._samples]

    def _mixture_line(self, record: StepRecord) -> str:
        if record.domains != self._domains:
            self._domains, self._encoders = record.domains, {}
        parts = [f'{{"step":{record.step}']
        for name in ("probability", "domain_loss", "tokens", "samples", "epochs"):
            parts.append(self._vector(name, getattr(record, name)))
        for name in LEDGER_VECTORS:
            if (values := getattr(record, name)) is not None:
                parts.append(self._vector(name, values))
        if record.target_loss is not None:
            parts.append(f'"target_loss":{dumps(named(record.target_loss))}')
        if record.control is not None:
            parts.append(f'"control":{dumps(record.control)}')
        if record.fresh_quota is not None:
            parts.append(f'"fresh_quota":{dumps(record.fresh_quota)}')
        if record.probe is not None:
            parts.append(f'"probe":{dumps(record.probe)}')
        if record.extra_tokens:
            parts.append(f'"extra_tokens":{dumps(dict(record.extra_tokens))}')
        if record.skipped:
            parts.append('"skipped":true')
        return ",".join(parts) + "}"

    def _vector(self, name: str, values: Any) -> str:
        encoder = self._encoders.get(name)
        if encoder is None:
            encoder = self._encoders[name] = VectorEncoder(self._domains)
        return f'"{name}":{encoder.encode(values)}'

    def _write_info(self, info: Mapping[str, Any]) -> None:
        path = self._dir / RUN_INFO
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(dumps(dict(info)) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def metrics_line(record: StepRecord, overhead: Mapping[str, float]) -> str:
    """Return the line of ``metrics.jsonl`` for a logged step.

    Args:
        record: the step.
        overhead: seconds since the line before: of all steps under :data:`ALL_STEPS`, and
            what mixing took of them by kind.
    """
    line: dict[str, Any] = {
        "step": record.step,
        "loss": number(record.loss),
        "learning_rate": number(record.learning_rate),
        "tokens_per_second": number(record.tokens_per_second),
    }
    for name in ("grad_norm", "loss_scale", "seconds", "eta_seconds", "mfu"):
        if (value := getattr(record, name)) is not None:
            line[name] = number(value)
    line |= {name: number(value) for name, value in record.statistics.items()}
    for name in METRICS_VECTORS:
        if (values := getattr(record, name)) is not None:
            line[name] = named(dict(zip(record.domains, values.tolist(), strict=True)))
    if overhead.keys() - {ALL_STEPS}:
        line["overhead"] = named(overhead)
    if record.skipped:
        line["skipped"] = True
    return dumps(line)


def validation_line(record: ValidationRecord) -> str:
    """Return the line of ``metrics.jsonl`` for a validation."""
    return dumps(validation_fields(record))


def validation_fields(record: ValidationRecord) -> dict[str, Any]:
    """Return the fields of a validation's line."""
    name = f"{record.split}_loss"
    line: dict[str, Any] = {"step": record.step, name: named(record.valid_loss)}
    line[f"average_{name}"] = number(record.average)
    if record.weights is not None:
        line[f"weighted_average_{name}"] = number(record.weighted_average)
    # The same, and perplexities, under the names that the sinks have them by.
    line |= {key: number(value) for key, value in average_scalars(record).items()}
    if record.bits_per_byte:
        line["bits_per_byte"] = named(record.bits_per_byte)
    if record.character_loss:
        perplexities = {name: perplexity(loss) for name, loss in record.character_loss.items()}
        line["char_lvl_ppl"] = named(perplexities)
    if record.review is not None:
        line["review"] = record.review
    if record.seconds is not None:
        line["seconds"] = number(record.seconds)
    return line


def average_scalars(record: ValidationRecord) -> dict[str, float]:
    """Return the averages over domains, by the names that charts have them by."""
    return {k: v for k, v in validation_scalars(record).items() if _AVERAGE.search(k)}


def tasks_line(record: TaskRecord) -> str:
    """Return the line of ``metrics.jsonl`` for an evaluation by tasks."""
    return dumps(task_fields(record))


def task_fields(record: TaskRecord) -> dict[str, Any]:
    """Return the fields of an evaluation's line."""
    tasks = {task: named(metrics) for task, metrics in record.tasks.items()}
    line: dict[str, Any] = {"step": record.step, "tasks": tasks}
    if record.num_fewshot:
        line["num_fewshot"] = dict(record.num_fewshot)
    if record.seconds is not None:
        line["seconds"] = number(record.seconds)
    return line
