"""Dividing one prefix into train, valid and test parts of whole documents."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.data.reader import TokenReader
from megatron.errors import ConfigError, DataError

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DocumentRange:
    """Consecutive documents ``[first, last)``, which are tokens ``[start, stop)``."""

    first: int
    last: int
    start: int
    stop: int


def parse_split(text: str) -> tuple[float, float, float]:
    """Read NeoX's ``split``: up to three shares, separated by ``,`` or ``/``.

    Args:
        text: such as ``"969, 30, 1"``; shares left out are 0.

    Returns:
        Shares of train, valid and test that sum to 1.

    Raises:
        ConfigError: not one to three non-negative numbers with a positive sum.
    """
    problem = f"split: '{text}' is not one to three shares such as '969,30,1'"
    try:
        shares = [float(part) for part in re.split(r"[,/]", str(text))]
    except ValueError:
        raise ConfigError(f"{problem}: each must be a number") from None
    if len(shares) > len(SPLIT_NAMES):
        raise ConfigError(f"{problem}: there are {len(shares)}")
    if any(share < 0 or not math.isfinite(share) for share in shares):
        raise ConfigError(f"{problem}: a share is negative or not finite")
    total = sum(shares)
    if total <= 0:
        raise ConfigError(f"{problem}: all are zero")
    shares += [0.0] * (len(SPLIT_NAMES) - len(shares))
    return shares[0] / total, shares[1] / total, shares[2] / total


def split_documents(reader: TokenReader, split: str, which: str) -> DocumentRange:
    """Find one part of a prefix.

    Shares are shares of tokens; each boundary is moved to the nearest start of a document,
    found by binary search in the index.

    Args:
        reader: the prefix.
        split: see :func:`parse_split`.
        which: ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        ConfigError: ``split`` or ``which`` is not understood.
    """
    if which not in SPLIT_NAMES:
        raise ConfigError(f"part '{which}' of a split: it has {', '.join(SPLIT_NAMES)}")
    shares = parse_split(split)
    part = SPLIT_NAMES.index(which)
    return document_range(
        reader, _boundary(reader, shares, part), _boundary(reader, shares, part + 1)
    )


def document_range(reader: TokenReader, first: int, last: int) -> DocumentRange:
    """Return documents ``[first, last)`` with their tokens.

    Raises:
        DataError: the index is damaged there.
    """
    start, stop = reader.document_start(first), reader.document_start(last)
    if start > stop:
        raise DataError(
            f"{reader.prefix}.idx: damaged: document {first} starts behind document {last}; "
            "copy or preprocess it again"
        )
    return DocumentRange(first=first, last=last, start=start, stop=stop)


def _boundary(reader: TokenReader, shares: Sequence[float], part: int) -> int:
    """Return the document at which a part starts: the start nearest to its share of the tokens."""
    if not any(shares[part:]):  # what rounding leaves over belongs to the last part with a share
        return reader.num_documents
    target = round(sum(shares[:part]) * reader.num_tokens)
    after = reader.documents_before(target)
    if after == 0:
        return 0
    before_start, after_start = reader.document_start(after - 1), reader.document_start(after)
    return after - 1 if target - before_start <= after_start - target else after
