"""The live table of a run, drawn with rich."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron.monitor.console import change_text, headline, loss_text, task_lines
from megatron.monitor.interval import Interval
from megatron.monitor.record import FloatArray, StepRecord, TaskRecord, ValidationRecord

REFRESH_SECONDS = 0.5
BAR = 24
# A loss shown live is a mean over about this many steps: long enough that rare
# domains have a number, short enough to move.
MEMORY = 20


class LiveView:
    """A table that is redrawn at most twice a second: share, bar, loss by domain."""

    def __init__(self, stream: TextIO, total_steps: int | None) -> None:
        """Draw on ``stream``, which is a terminal."""
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._total = total_steps
        self._shown = -math.inf
        self._record: StepRecord | None = None
        self._valid: ValidationRecord | None = None
        self._valid_first: ValidationRecord | None = None
        self._loss: FloatArray = np.zeros(0)
        self._share: FloatArray = np.zeros(0)

    def start(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Open the live region."""
        if resume_step is not None:
            self._console.print(f"going on after step {resume_step}")
        self._live.start()

    def step(self, record: StepRecord, interval: Interval, *, logged: bool) -> bool:
        """Take the step in and redraw if the picture is old enough."""
        self._record = record
        now = time.monotonic()
        if now - self._shown < REFRESH_SECONDS:
            return False
        self._blend(interval)
        self._draw()
        self._shown = now
        return True

    def validation(self, record: ValidationRecord, first: ValidationRecord) -> None:
        """Show the validation losses in their columns."""
        if record.split == "valid":
            self._valid, self._valid_first = record, first
        else:
            self._console.print(
                f"step {record.step} · {record.split} loss {loss_text(record.average)}"
            )
        self._draw()

    def tasks(self, record: TaskRecord) -> None:
        """Print the metrics above the table."""
        self._console.print("\n".join(task_lines(record)), markup=False)

    def close(self) -> None:
        """Draw the last state and leave it standing."""
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def _blend(self, interval: Interval) -> None:
        keep = max(0.0, 1 - interval.steps / MEMORY)
        loss, share = interval.domain_loss, interval.share
        if self._loss.shape != loss.shape:
            self._loss, self._share = loss.copy(), share.copy()
            return
        fresh = np.where(np.isnan(self._loss), loss, keep * self._loss + (1 - keep) * loss)
        self._loss = np.where(np.isnan(loss), self._loss, fresh)
        self._share = keep * self._share + (1 - keep) * share

    def _draw(self) -> None:
        if self._record is not None:
            self._live.update(self._picture(self._record), refresh=True)

    def _picture(self, record: StepRecord) -> Group:
        parts: list[Any] = [Text(" · ".join(headline(record, self._total)), style="bold")]
        if self._total:
            parts.append(ProgressBar(total=self._total, completed=record.step))
        parts.append(self._table(record))
        return Group(*parts)

    def _table(self, record: StepRecord) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("domain", overflow="ellipsis", no_wrap=True)
        for name in ("asked", "share"):
            table.add_column(name, justify="right")
        table.add_column("", width=BAR, no_wrap=True)
        for name in ("loss", "validation", "epochs"):
            table.add_column(name, justify="right")
        count = len(record.domains)
        room = max(3, self._console.height - 6)
        order = np.arange(count)
        if count > room:
            order = np.argsort(-record.probability, kind="stable")[: room - 1]
        top = float(np.nanmax(record.probability)) or 1.0
        share = self._share if len(self._share) == count else record.probability
        loss = self._loss if len(self._loss) == count else record.domain_loss
        for k in order:
            table.add_row(
                record.domains[k],
                f"{record.probability[k]:.1%}",
                f"{share[k]:.1%}",
                bar(float(record.probability[k]) / top),
                loss_text(float(loss[k])),
                self._validation_text(record.domains[k]),
                f"{record.epochs[k]:.2f}",
            )
        if count > len(order):
            table.add_row(Text(f"and {count - len(order)} more domains", style="dim"))
        return table

    def _validation_text(self, domain: str) -> Text:
        if self._valid is None or domain not in self._valid.valid_loss:
            return Text("–", style="dim")
        now = self._valid.valid_loss[domain]
        first = self._valid_first.valid_loss.get(domain) if self._valid_first else None
        text = Text(loss_text(now))
        change = change_text(first, now)
        if change and first is not None:
            text.append(change, style="green" if now < first else "red")
        return text


def bar(part: float) -> Text:
    """Return a bar of ``part`` (0 to 1) of the full width, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, part)) * BAR * 8)
    whole, rest = divmod(eighths, 8)
    return Text("█" * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest], style="cyan")
