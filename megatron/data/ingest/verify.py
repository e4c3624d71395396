"""Checking a dataset byte by byte: pointers, token ids, and the sidecar's checksums."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron.data.ingest.stamps import stamp
from megatron.data.reader import TokenReader
from megatron.data.sidecar import Sidecar, sidecar_path
from megatron.errors import DataError

_BLOCK_TOKENS = 1 << 22


@dataclass(kw_only=True)
class Verification:
    """What was found.

    Attributes:
        problems: each a sentence naming the file; empty if the dataset is sound.
        notes: what could not be checked.
        checked: what was.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)


def verify_dataset(prefix: str) -> Verification:
    """Check a dataset completely: every byte of both files is read.

    With a sidecar any flipped bit is found by its checksums; without one only damage that
    breaks the structure is.
    """
    found = Verification()
    try:
        with TokenReader(prefix) as reader:
            found.checked.append("header, sizes of both files, token type")
            reader.verify_index()
            found.checked.append(f"pointers of {reader.num_documents:,} documents")
            if reader.sidecar is None:
                found.notes.append(
                    f"{sidecar_path(prefix)}: not there, so there are no checksums: a changed "
                    "token would not be noticed"
                )
                return found
            _check_stamps(prefix, reader.sidecar, found)
            _check_tokens(reader, reader.sidecar, found)
    except DataError as error:
        found.problems.append(str(error))
    return found


def _check_stamps(prefix: str, sidecar: Sidecar, found: Verification) -> None:
    for suffix, expected in ((".bin", sidecar.bin), (".idx", sidecar.idx)):
        path = prefix + suffix
        now = stamp(path)
        if now != expected:
            found.problems.append(
                f"{path}: its content has changed since it was written (SHA-256 "
                f"{now.sha256[:12]}…, {sidecar_path(prefix).name} has {expected.sha256[:12]}…); "
                "copy or preprocess it again"
            )
        else:
            found.checked.append(f"SHA-256 of {Path(path).name}")


def _check_tokens(reader: TokenReader, sidecar: Sidecar, found: Verification) -> None:
    for start in range(0, reader.num_tokens, _BLOCK_TOKENS):
        block = reader.read(start, min(start + _BLOCK_TOKENS, reader.num_tokens))
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= sidecar.vocab_size:
            wrong = low if low < 0 else high
            found.problems.append(
                f"{reader.prefix}.bin: token id {wrong} near token {start}, the vocabulary has "
                f"{sidecar.vocab_size}"
            )
            return
    found.checked.append(f"{reader.num_tokens:,} token ids below {sidecar.vocab_size:,}")
    if sidecar.append_eod:
        _check_ends(reader, sidecar, found)


def _check_ends(reader: TokenReader, sidecar: Sidecar, found: Verification) -> None:
    """Check that documents end as the sidecar says, at the first and last thousand."""
    count = reader.num_documents
    for document in {*range(min(count, 1000)), *range(max(0, count - 1000), count)}:
        stop = reader.document_start(document + 1)
        last = reader.read(stop - 1, stop) if reader.document_size(document) else np.empty(0)
        if last.size == 0 or int(last[0]) != sidecar.eod_id:
            found.problems.append(
                f"{sidecar_path(reader.prefix)}: says that documents end with token "
                f"{sidecar.eod_id}; document {document} does not"
            )
            return
    found.checked.append("documents end with the end-of-document token")
