"""Finding the inputs: files, comma lists, globs, folders and data sets on disk."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import DataError, did_you_mean

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
_TABLES = (".parquet",)
SUPPORTED = (
    ".jsonl, .ndjson, .json (one object a line) and .txt, each also with .gz, .zst, .xz or .bz2; "
    ".parquet; folders of these; data sets saved by Hugging Face datasets"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input.

    Attributes:
        path: file, or folder of a saved data set.
        kind: "jsonl", "lines", "text", "parquet" or "dataset".
        compression: ".gz", ".zst", ".xz", ".bz2" or "".
        size: bytes on disk.
        modified_ns: time of the last change, to notice one.
    """

    path: str
    kind: str
    compression: str
    size: int
    modified_ns: int

    def identity(self) -> list[Any]:
        """Return what must stay the same between an interruption and going on, JSON-able."""
        return [os.path.abspath(self.path), self.kind, self.size, self.modified_ns]


def find_sources(
    inputs: Sequence[str], *, text_documents: str = "file", flag: str = "--input"
) -> list[Source]:
    """Resolve what the user named, in that order; globs and folders in sorted order.

    Args:
        inputs: paths, globs or comma lists of them.
        text_documents: "file" (a plain-text file is one document) or "line".
        flag: that named them, for messages.

    Raises:
        DataError: something does not exist, matches nothing or is of no known format.
    """
    found: list[Source] = []
    for given in inputs:
        for name in _split(given):
            found.extend(_resolve(name, text_documents, flag))
    if not found:
        raise DataError(f"no input: name files, folders or globs with {flag}")
    return found


def _split(given: str) -> list[str]:
    """Split a comma list, unless a file is called so, comma and all."""
    if os.path.exists(given):
        return [given]
    return [part for part in (part.strip() for part in given.split(",")) if part]


def _resolve(name: str, text_documents: str, flag: str) -> Iterator[Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _folder(path, text_documents, flag)
    elif path.exists():
        yield _file(path, text_documents, flag)
    elif glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"{flag} {name}: no file matches")
        for match in matches:
            if Path(match).is_file():
                yield _file(Path(match), text_documents, flag)
            elif _is_dataset(Path(match)):
                yield _dataset(Path(match))
    else:
        near = [str(other) for other in _siblings(path)]
        raise DataError(f"{flag} {name}: no such file or folder{did_you_mean(str(path), near)}")


def _folder(folder: Path, text_documents: str, flag: str) -> Iterator[Source]:
    if _is_dataset(folder):
        yield _dataset(folder)
        return
    if (folder / "dataset_dict.json").exists():
        parts = sorted(child.name for child in folder.iterdir() if _is_dataset(child))
        raise DataError(
            f"{flag} {folder}: a data set with the splits {', '.join(parts)}; name one: "
            f"{folder / (parts[0] if parts else 'train')}"
        )
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _kind(file)]
    if not files:
        raise DataError(
            f"{flag} {folder}: the folder holds no file of a known format ({SUPPORTED})"
        )
    for file in files:
        yield _file(file, text_documents, flag)


def _file(path: Path, text_documents: str, flag: str) -> Source:
    kind = _kind(path)
    if kind is None:
        ending = "".join(path.suffixes[-2:]) or "no extension"
        raise DataError(f"{flag} {path}: unknown format ({ending}); known: {SUPPORTED}")
    if kind == "text" and text_documents == "line":
        kind = "lines"
    status = path.stat()
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return Source(
        path=str(path),
        kind=kind,
        compression=compression,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def _kind(path: Path) -> str | None:
    if path.suffix in _TABLES:
        return "parquet"
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return _FORMATS.get(suffix)


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _dataset(folder: Path) -> Source:
    files = [file.stat() for file in sorted(folder.iterdir()) if file.is_file()]
    return Source(
        path=str(folder),
        kind="dataset",
        compression="",
        size=sum(status.st_size for status in files),
        modified_ns=max(status.st_mtime_ns for status in files),
    )


def _siblings(path: Path) -> Iterable[Path]:
    try:
        return list(path.parent.iterdir())
    except OSError:
        return []
