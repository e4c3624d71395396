"""The run on the console: plain lines, or a live table on a terminal."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

import numpy as np

from megatron.monitor.interval import Interval
from megatron.monitor.record import AuditRecord, StepRecord, TaskRecord, ValidationRecord, is_logged
from megatron.monitor.throughput import duration, short

LINE_WIDTH = 100
MOST_DOMAINS = 24


class View(Protocol):
    """A way to put steps on the screen."""

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Begin."""
        ...

    def step(self, record: StepRecord, interval: Interval, *, logged: bool) -> bool:
        """Show a step; return whether the interval has been used up."""
        ...

    def validation(self, record: ValidationRecord, first: ValidationRecord) -> None:
        """Show a validation beside the first one that this process saw."""
        ...

    def tasks(self, record: TaskRecord) -> None:
        """Show an evaluation by tasks."""
        ...

    def close(self) -> None:
        """End."""
        ...


class ConsoleSink:
    """Shows the run on rank 0: live on a terminal, plain lines anywhere else."""

    essential = False

    def __init__(
        self,
        *,
        log_interval: int = 1,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        """Write to ``stream`` (default: standard output).

        Args:
            log_interval: steps between two plain lines.
            total_steps: length of the run, for the progress.
            stream: where to write.
            live: a live table or not; ``None`` takes one on a terminal where rich is installed.
        """
        stream = stream or sys.stdout
        self._log_interval = log_interval
        self._interval = Interval()
        self._first: dict[str, ValidationRecord] = {}
        self._view = choose_view(stream, total_steps, live)

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Say whether the run begins or goes on."""
        self._view.start(resume_step, info)

    def step(self, record: StepRecord) -> None:
        """Show a step when its turn has come."""
        self._interval.add(record)
        logged = is_logged(record.step, self._log_interval)
        if self._view.step(record, self._interval, logged=logged):
            self._interval.clear()

    def validation(self, record: ValidationRecord) -> None:
        """Show a validation and the change since the first."""
        first = self._first.setdefault(record.split, record)
        self._view.validation(record, first)

    def tasks(self, record: TaskRecord) -> None:
        """Show an evaluation by tasks."""
        self._view.tasks(record)

    def audit(self, record: AuditRecord) -> None:
        """Ignore: sample lists are for files."""

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is printed."""

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._view.close()


def choose_view(stream: TextIO, total_steps: int | None, live: bool | None) -> View:
    """Return the live view on a terminal that can show it, plain lines otherwise."""
    if live is None:
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
    if live and importlib.util.find_spec("rich") is not None:
        from megatron.monitor.live import LiveView

        return LiveView(stream, total_steps)
    return PlainView(stream, total_steps)


class PlainView:
    """Lines for a log file: one for the step, and as many as the domains need below it."""

    def __init__(self, stream: TextIO, total_steps: int | None) -> None:
        """Write to ``stream``."""
        self._stream = stream
        self._total = total_steps

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Say where the run begins."""
        if resume_step is not None:
            self._print([f"going on after step {resume_step}"])

    def step(self, record: StepRecord, interval: Interval, *, logged: bool) -> bool:
        """Print a logged step with the losses and shares since the last one."""
        if not logged:
            return False
        parts = headline(record, self._total)
        order = by_share(interval)
        losses, shares = interval.domain_loss, interval.share
        cells = [
            f"{interval.domains[k]} {shares[k]:.1%} {loss_text(losses[k])}"
            for k in order[:MOST_DOMAINS]
        ]
        if len(order) > MOST_DOMAINS:
            cells.append(f"and {len(order) - MOST_DOMAINS} more domains")
        lines = [" · ".join(parts), *wrap(cells)]
        if times := timer_cells(record):
            lines += wrap(times)
        self._print(lines)
        return True

    def validation(self, record: ValidationRecord, first: ValidationRecord) -> None:
        """Print the losses and their change since the first measurement."""
        name = "validation" if record.split == "valid" else record.split
        head = f"step {record.step} · {name} loss {loss_text(record.average)} (mean of domains)"
        cells = [
            f"{domain} {loss_text(loss)}{change_text(first.valid_loss.get(domain), loss)}"
            for domain, loss in list(record.valid_loss.items())[:MOST_DOMAINS]
        ]
        if len(record.valid_loss) > MOST_DOMAINS:
            cells.append(f"and {len(record.valid_loss) - MOST_DOMAINS} more domains")
        self._print([head, *wrap(cells)])

    def tasks(self, record: TaskRecord) -> None:
        """Print the metrics."""
        self._print(task_lines(record))

    def close(self) -> None:
        """Nothing is held back."""

    def _print(self, lines: list[str]) -> None:
        print("\n".join(lines), file=self._stream, flush=True)


def headline(record: StepRecord, total: int | None) -> list[str]:
    """Return the parts of a step's first line."""
    width = len(str(total)) if total else 0
    parts = [f"step {record.step:>{width}}/{total}" if total else f"step {record.step}"]
    parts.append(f"loss {loss_text(record.loss)}")
    parts.append(f"lr {record.learning_rate:.3g}")
    if record.grad_norm is not None:
        parts.append(f"gradient {record.grad_norm:.3g}")
    if record.tokens_per_second is not None:
        parts.append(f"{short(record.tokens_per_second)} tok/s")
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    if record.eta_seconds is not None:
        parts.append(f"ETA {duration(record.eta_seconds)}")
    if record.skipped:
        parts.append("update skipped")
    return parts


def timer_cells(record: StepRecord) -> list[str]:
    """Return where a step's time went, where that was taken."""
    return [
        f"{name.removeprefix('timers/')} {seconds * 1e3:.1f} ms"
        for name, seconds in record.statistics.items()
        if name.startswith("timers/")
    ]


def by_share(interval: Interval) -> list[int]:
    """Return the domains' indices: in their own order if all fit, else by falling share."""
    count = len(interval.domains)
    if count <= MOST_DOMAINS:
        return list(range(count))
    return [int(k) for k in np.argsort(-np.nan_to_num(interval.share), kind="stable")]


def task_lines(record: TaskRecord) -> list[str]:
    """Return the metrics of an evaluation by tasks, one task beside the other."""
    cells = [
        f"{task} {name} {value:.4g}"
        for task, metrics in record.tasks.items()
        for name, value in metrics.items()
        if "_stderr" not in name
    ]
    return [f"step {record.step} · evaluation by tasks", *wrap(cells)]


def loss_text(loss: float) -> str:
    """Return a loss with four digits, ``–`` where there is none."""
    return f"{loss:.4f}" if math.isfinite(loss) else "–"


def change_text(before: float | None, now: float) -> str:
    """Return ``" (-12.3%)"``, or nothing when there is nothing to compare."""
    if before is None or not math.isfinite(before) or not math.isfinite(now) or before == now:
        return ""
    return f" ({now / before - 1:+.1%})" if before else ""


def wrap(cells: list[str]) -> list[str]:
    """Set cells side by side, indented, in lines of at most ``LINE_WIDTH`` characters."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + 3 + len(cell) <= LINE_WIDTH:
            lines[-1] += " | " + cell
        else:
            lines.append("    " + cell)
    return lines
