"""``PREFIX.meta.json``: what preprocessing knows of a dataset and the index does not say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import DataError

SIDECAR_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Contents of ``PREFIX.meta.json``.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, end-of-document tokens included.
        bytes: UTF-8 bytes of the text that was tokenised.
        dtype: token type by name ("uint16").
        vocab_size: of the tokenizer, unpadded.
        append_eod: whether each document ends with ``eod_id``.
        eod_id: the end-of-document token, if there is one.
        tokenizer: at least its ``type`` and the ``sha256`` of its files.
        bin: stamp of the ``.bin``.
        idx: stamp of the ``.idx``.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    vocab_size: int
    append_eod: bool
    eod_id: int | None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    bin: FileStamp
    idx: FileStamp

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token, which turns nats per token into bits per byte."""
        return self.bytes / self.tokens if self.tokens else None


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the sidecar's path for a prefix."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def read_sidecar(prefix: str | os.PathLike[str]) -> Sidecar | None:
    """Read a prefix's sidecar; ``None`` if it has none.

    Raises:
        DataError: the file is there and is not a sidecar.
    """
    path = sidecar_path(prefix)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable ({error}); delete it, or preprocess again") from None
    try:
        if content["version"] != SIDECAR_VERSION:
            raise DataError(
                f"{path}: version {content['version']!r}, only {SIDECAR_VERSION} is known; "
                "delete it, or preprocess again"
            )
        return Sidecar(
            documents=int(content["documents"]),
            tokens=int(content["tokens"]),
            bytes=int(content["bytes"]),
            dtype=str(content["dtype"]),
            vocab_size=int(content["vocab_size"]),
            append_eod=bool(content["append_eod"]),
            eod_id=None if content["eod_id"] is None else int(content["eod_id"]),
            tokenizer=dict(content["tokenizer"]),
            bin=_stamp(content["bin"]),
            idx=_stamp(content["idx"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: a field is missing or of the wrong type ({type(error).__name__}: {error}); "
            "delete it, or preprocess again"
        ) from None


def write_sidecar(prefix: str | os.PathLike[str], sidecar: Sidecar) -> None:
    """Write a prefix's sidecar atomically (temporary file, fsync, rename)."""
    path = sidecar_path(prefix)
    content: dict[str, Any] = {"version": SIDECAR_VERSION}
    for name in Sidecar.__dataclass_fields__:
        value = getattr(sidecar, name)
        content[name] = vars(value) if isinstance(value, FileStamp) else value
    content["tokenizer"] = dict(sidecar.tokenizer)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def _stamp(content: Mapping[str, Any]) -> FileStamp:
    return FileStamp(size=int(content["size"]), sha256=str(content["sha256"]))
