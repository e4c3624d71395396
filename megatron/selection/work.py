"""The folder beside a table in which it comes into being: locks, journal, chunks."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.files import replace_file
from megatron.errors import DataError, RunError
from megatron.selection.base import Say

_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """Where a scoring is at work.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def index(self) -> Path:
        """Folder of the corpus's indexes."""
        return self.path / "index"

    @property
    def prepared(self) -> Path:
        """Folder of what the method prepares."""
        return self.path / "prepared"

    @property
    def chunks(self) -> Path:
        """Folder of the scores that are there."""
        return self.path / "chunks"

    def chunk(self, number: int) -> Path:
        """Return where a chunk's scores are, once they are whole."""
        return self.chunks / f"{number:08d}.parquet"

    @contextmanager
    def lock(self, name: str, *, shared: bool = False, wait: Say | None = None) -> Iterator[None]:
        """Hold a lock, which ends with the process however that ends.

        Args:
            name: of the lock.
            shared: let others hold it in the same way.
            wait: takes a line before waiting for another holder; None does not wait.

        Raises:
            RunError: another process holds it, or the folder cannot be written.
        """
        path = self.path / f"{name}.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(path, error) from None
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except OSError:
                holder = (
                    os.pread(descriptor, 64, 0).decode(errors="replace").strip()
                    or "another process"
                )
                if wait is None:
                    raise RunError(
                        f"{self.path}: {holder} works on it; wait for it, or choose another --out"
                    ) from None
                wait(f"waiting for {holder}")
                fcntl.flock(descriptor, kind)
            if not shared:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def settings(self) -> dict[str, Any] | None:
        """Return what decides the scores here; None if nothing was begun."""
        found = self._read("journal.json")
        return None if found is None else dict(found["settings"])

    def words(self) -> list[str]:
        """Return how the corpus was named when it was begun."""
        found = self._read("journal.json") or {}
        return [str(word) for word in found.get("words", [])]

    def begin(self, settings: Mapping[str, Any], words: Sequence[str]) -> None:
        """Write down what decides the scores, and how the corpus was named."""
        content = {"version": _VERSION, "settings": dict(settings), "words": list(words)}
        write_json(self.path / "journal.json", content)

    def preparation(self) -> dict[str, Any] | None:
        """Return what preparing has cost; None if it has not ended."""
        found = self._read("prepared.json")
        return None if found is None else dict(found["cost"])

    def end_preparation(self, cost: Mapping[str, Any]) -> None:
        """Write down that preparing has ended."""
        write_json(self.path / "prepared.json", {"version": _VERSION, "cost": dict(cost)})

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            found = json.loads(path.read_bytes())
            if found.pop("version") != _VERSION:
                raise DataError(f"{path}: of another version; --overwrite starts again")
            return dict(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: unreadable ({error}); --overwrite starts again") from None


def work_folder(out: Path, given: Path | None = None) -> WorkFolder:
    """Return the folder that belongs to a table."""
    return WorkFolder(path=given or out.with_name(f"{out.name}.work"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically and durably.

    Raises:
        RunError: it cannot be written.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise _unwritable(path, error) from None


def difference(now: Any, then: Any, name: str = "") -> str | None:
    """Say where two settings differ first; None if they do not."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        for key in (*now, *(key for key in then if key not in now)):
            place = f"{name}.{key}" if name else str(key)
            found = difference(now.get(key), then.get(key), place)
            if found is not None:
                return found
        return None
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for number, (a, b) in enumerate(zip(now, then, strict=True)):
            label = a.get("name", number) if isinstance(a, Mapping) else number
            found = difference(a, b, f"{name} {label}")
            if found is not None:
                return found
        return None
    return None if now == then else f"{name} was {_shown(then)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path}: cannot be written: {error.strerror or error}")
