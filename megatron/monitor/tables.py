"""Comma-separated tables: a file for each number, as DeepSpeed's CSV monitor keeps them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import RunError
from megatron.monitor.charts import ChartSink, Scalars


class CsvSink(ChartSink):
    """Writes ``step,value`` into ``NAME.csv``, with ``_`` for what no file's name should hold."""

    def __init__(self, folder: Path, *, log_interval: int = 1) -> None:
        """Write into ``folder``."""
        super().__init__(log_interval=log_interval)
        self._folder = folder

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Make the folder; cut what is there after ``resume_step``, all of it in a new run.

        Raises:
            RunError: it cannot be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*.csv"):
                self._cut(path, resume_step)
        except OSError as error:
            raise RunError(f"{self._folder}: cannot be written to: {error.strerror}") from error

    def emit(self, scalars: Scalars, step: int) -> None:
        """Add a line to each number's table."""
        for name, value in scalars.items():
            path = self._folder / f"{_file_name(name)}.csv"
            fresh = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if fresh:
                    writer.writerow(["step", name])
                writer.writerow([step, repr(float(value))])

    def _cut(self, path: Path, resume_step: int | None) -> None:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows or rows[0][:1] != ["step"] or _file_name(rows[0][-1]) != path.stem:
            return  # somebody else's
        if resume_step is None:
            path.unlink()
            return
        kept = [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= resume_step]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*rows[:1], *kept])


def _file_name(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-._" else "_" for sign in name)
