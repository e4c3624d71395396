"""Reading JSON lines that another process may still be writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import RunError
from megatron.monitor.append import lines_backwards, parse


@dataclass
class LineCount:
    """What a pass over a file came across."""

    records: int = 0
    unreadable: int = 0


def read_lines(path: Path, count: LineCount) -> Iterator[dict[str, Any]]:
    """Yield the records of ``path`` in order, up to the last complete line.

    A last line without its end is being written at this moment and is left out
    in silence; any other line that holds no record is counted in ``count``.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict) and type(record.get("step")) is int:
                    count.records += 1
                    yield record
                else:
                    count.unreadable += 1
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error


def last_step(path: Path) -> int | None:
    """Return the step of the last complete record of ``path`` without reading the rest."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        for number, (_, line) in enumerate(lines_backwards(descriptor)):
            record = parse(line) if number else None
            if record is not None:
                step = record["step"]
                return step if isinstance(step, int) else None
    finally:
        os.close(descriptor)
    return None
