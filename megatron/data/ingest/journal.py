"""The durable record of a preprocessing run: what was asked, how far it came, how it ended."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import DataError, RunError

JOURNAL_VERSION = 1


@dataclass(kw_only=True)
class KeyProgress:
    """How far one key's dataset is."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0


@dataclass(kw_only=True)
class Journal:
    """State of a run; ``PREFIX.preprocess.json``.

    Attributes:
        settings: what decides the output: inputs, keys, tokenizer, switches.
        state: "running", "closing" (all is encoded, files get their names) or "done".
        fast: whether the fast encoder is used.
        source: index of the input to go on with.
        position: where in it.
        keys: progress by key.
        bad: records left out as unusable.
        seconds: time spent encoding so far.
    """

    settings: dict[str, Any]
    state: str = "running"
    fast: bool = True
    source: int = 0
    position: int = 0
    keys: dict[str, KeyProgress] = field(default_factory=dict)
    bad: int = 0
    seconds: float = 0.0


def journal_path(output_prefix: str) -> Path:
    """Return where a run's journal lies."""
    return Path(f"{output_prefix}.preprocess.json")


def read_journal(output_prefix: str) -> Journal | None:
    """Read a journal; None if there is none.

    Raises:
        DataError: the file is there and is no journal.
    """
    path = journal_path(output_prefix)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable ({error}); --overwrite starts again") from None
    try:
        if content.pop("version") != JOURNAL_VERSION:
            raise DataError(f"{path}: of another version; --overwrite starts again")
        keys = {key: KeyProgress(**progress) for key, progress in content.pop("keys").items()}
        return Journal(**content, keys=keys)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a journal ({error}); --overwrite starts again") from None


def write_journal(output_prefix: str, journal: Journal) -> None:
    """Write a journal atomically and durably.

    Raises:
        RunError: it cannot be written.
    """
    path = journal_path(output_prefix)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump({"version": JOURNAL_VERSION, **asdict(journal)}, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None


def settings_difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """Say how two runs' settings differ; None if they do not."""
    for name in now:
        if now[name] == then.get(name):
            continue
        if name == "inputs":
            return _inputs_difference(now[name], then.get(name) or [])
        return f"{name} was {_shown(then.get(name))}, is {_shown(now[name])}"
    return None


@contextmanager
def output_lock(output_prefix: str) -> Iterator[None]:
    """Hold the right to write a prefix; it ends with the process, however that ends.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    path = Path(f"{output_prefix}.preprocess.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(
            f"--output-prefix {output_prefix}: cannot be written: {error.strerror or error}"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise RunError(
                f"--output-prefix {output_prefix}: another run writes it "
                f"(process {holder or '?'}); wait for it or choose another prefix"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        with suppress(OSError):
            path.unlink()
    finally:
        os.close(descriptor)


def _inputs_difference(now: list[Any], then: list[Any]) -> str:
    for a, b in zip(now, then, strict=False):
        if a != b:
            same_file = a[0] == b[0]
            return f"{a[0]} has changed" if same_file else f"an input was {b[0]}, is {a[0]}"
    return f"there were {len(then)} inputs, there are {len(now)}"


def _shown(value: Any) -> str:
    return json.dumps(value)
