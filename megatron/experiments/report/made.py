"""How a study's results came about: what a reader wants to know and the tables do not say."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.files import write_text
from megatron.experiments.compare.made import made_with

NAME = "made.json"


@dataclass(frozen=True, kw_only=True)
class Made:
    """How the results of a command came about.

    Attributes:
        command: its command line, a word each; empty if not known.
        date: when it ended, in UTC.
        versions: of Python and the libraries.
        machine: that the command ran on; runs may have run elsewhere.
        failed: why runs failed, by name.
    """

    command: tuple[str, ...] = ()
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)


def command_line(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the words that a command was given; empty if it was not called from a shell."""
    return tuple(getattr(options, "words", ()))


def make_note(out: Path, command: Sequence[str], failed: Mapping[str, str]) -> None:
    """Write ``made.json`` into a study's folder.

    Raises:
        RunError: the disk refuses.
    """
    found = made_with()
    now = datetime.datetime.now(tz=datetime.UTC)
    facts = {
        "command": list(command),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "versions": found["versions"],
        "machine": found["machine"],
        "failed": dict(failed),
    }
    write_text(out / NAME, json.dumps(facts, indent=1, ensure_ascii=False))


def read_note(out: Path) -> Made:
    """Return what :func:`make_note` wrote; nothing is known where it cannot be read."""
    try:
        found: Any = json.loads((out / NAME).read_text(encoding="utf-8"))
        return Made(
            command=tuple(map(str, found["command"])),
            date=str(found["date"]),
            versions={str(name): str(text) for name, text in found["versions"].items()},
            machine=str(found["machine"]),
            failed={str(name): str(why) for name, why in found["failed"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Made()
