r"""The MMIDIDX layout: how a ``.idx`` file describes the tokens of its ``.bin``.

Little-endian, without padding, so the 64-bit arrays are unaligned::

    [0:9]    "MMIDIDX\0\0"
    [9:17]   u64  version, 1
    [17]     u8   dtype code
    [18:26]  u64  N, number of sequences (documents)
    [26:34]  u64  D, length of doc_idx
    N × i32  sizes, in tokens
    N × i64  pointers, in bytes from the start of the .bin
    D × i64  doc_idx: 0, 1, …, N as written by GPT-style preprocessing

GPT-NeoX's older ``cached`` and ``lazy`` data sets have an index of 64-bit numbers, which is read
too, and never written::

    [0:8]    "TNTIDX\0\0"
    [8:56]   u64  version, 1; dtype code; bytes of a token; N; length of sizes; D
    N+1 × i64  dim_offsets: 0, 1, …, N (every item has one dimension)
    N+1 × i64  pointers, in tokens from the start of the .bin
    N × i64  sizes
    D × i64  doc_idx
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
LEGACY_HEADER_BYTES = 56
SIZE_BYTES = 4
POINTER_BYTES = 8
MAX_DOCUMENT_TOKENS = 2**31 - 1

_HEADER = struct.Struct("<9sQBQQ")
_LEGACY_HEADER = struct.Struct("<8sQQQQQQ")

# Codes 6 and 7 (floats) mean float32/float64 to GPT-NeoX and the reverse to megatron-core;
# no token is a float, so both are refused rather than guessed at.
TOKEN_DTYPES: MappingProxyType[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("<u1"),
        2: np.dtype("<i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        8: np.dtype("<u2"),
    }
)
FLOAT_CODES = frozenset({6, 7})


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """The fixed part of an index, and the places of its arrays.

    Attributes:
        dtype: token type of the ``.bin``.
        documents: N, number of sequences.
        doc_idx_length: D.
        legacy: whether it is an index of the older format.
    """

    dtype: np.dtype[Any]
    documents: int
    doc_idx_length: int
    legacy: bool = False

    @property
    def size_dtype(self) -> str:
        """Type of the sizes."""
        return "<i8" if self.legacy else "<i4"

    @property
    def size_bytes(self) -> int:
        """Bytes of a size."""
        return 8 if self.legacy else SIZE_BYTES

    @property
    def pointer_unit(self) -> int:
        """Bytes that a pointer counts: 1, or those of a token in the older format."""
        return self.dtype.itemsize if self.legacy else 1

    @property
    def sizes_at(self) -> int:
        """Byte offset of the sizes."""
        if self.legacy:
            return self.pointers_at + POINTER_BYTES * (self.documents + 1)
        return HEADER_BYTES

    @property
    def pointers_at(self) -> int:
        """Byte offset of the pointers."""
        if self.legacy:
            return LEGACY_HEADER_BYTES + POINTER_BYTES * (self.documents + 1)
        return HEADER_BYTES + SIZE_BYTES * self.documents

    @property
    def doc_idx_at(self) -> int:
        """Byte offset of doc_idx."""
        if self.legacy:
            return self.sizes_at + self.size_bytes * self.documents
        return self.pointers_at + POINTER_BYTES * self.documents

    @property
    def file_bytes(self) -> int:
        """Exact size of a whole index file."""
        return self.doc_idx_at + POINTER_BYTES * self.doc_idx_length

    def pack(self) -> bytes:
        """Return the header's 34 bytes."""
        code = dtype_code(self.dtype)
        return _HEADER.pack(MAGIC, VERSION, code, self.documents, self.doc_idx_length)


def parse_header(head: bytes, path: str) -> IndexHeader:
    """Read the first bytes of an index.

    Args:
        head: the file's first ``LEGACY_HEADER_BYTES`` bytes, or fewer if it is shorter.
        path: named in messages.

    Raises:
        DataError: the file is too short, of another format or version, or holds no tokens.
    """
    if head.startswith(LEGACY_MAGIC):
        return _parse_legacy(head, path)
    if not head:
        raise DataError(f"{path}: empty file, not a dataset index; copy or preprocess it again")
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise DataError(
            f"{path}: not a dataset index: it starts with {head[: len(MAGIC)]!r} instead of "
            f"{MAGIC!r}; give the prefix of files written by tools/preprocess_data.py"
        )
    if len(head) < HEADER_BYTES:
        raise DataError(
            f"{path}: truncated: {len(head)} bytes, an index has at least {HEADER_BYTES}; "
            "copy or preprocess it again"
        )
    _, version, code, documents, doc_idx_length = _HEADER.unpack(head[:HEADER_BYTES])
    dtype = _known_dtype(version, code, path)
    return IndexHeader(dtype=dtype, documents=documents, doc_idx_length=doc_idx_length)


def _parse_legacy(head: bytes, path: str) -> IndexHeader:
    if len(head) < LEGACY_HEADER_BYTES:
        raise DataError(
            f"{path}: truncated: {len(head)} bytes, a legacy index has at least "
            f"{LEGACY_HEADER_BYTES}; copy it again"
        )
    _, version, code, itemsize, documents, sizes, doc_idx_length = _LEGACY_HEADER.unpack(
        head[:LEGACY_HEADER_BYTES]
    )
    dtype = _known_dtype(version, code, path)
    if itemsize != dtype.itemsize or sizes != documents:
        raise DataError(
            f"{path}: damaged, or not a legacy index of tokens: {sizes} sizes of {documents} "
            f"items, {itemsize} bytes for a {dtype.name}; copy it again"
        )
    return IndexHeader(dtype=dtype, documents=documents, doc_idx_length=doc_idx_length, legacy=True)


def _known_dtype(version: int, code: int, path: str) -> np.dtype[Any]:
    if version != VERSION:
        raise DataError(f"{path}: index version {version}, only version {VERSION} is known")
    if code in FLOAT_CODES:
        raise DataError(f"{path}: dtype code {code} means floating-point values, not token ids")
    if code not in TOKEN_DTYPES:
        raise DataError(
            f"{path}: unknown dtype code {code} (token types: "
            f"{', '.join(f'{c} {d.name}' for c, d in TOKEN_DTYPES.items())}); "
            "the file is damaged or foreign"
        )
    return TOKEN_DTYPES[code]


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the code of a token type.

    Raises:
        DataError: the format has no code for it.
    """
    for code, known in TOKEN_DTYPES.items():
        if known == dtype:
            return code
    raise DataError(
        f"token type {dtype} cannot be stored; use one of "
        f"{', '.join(d.name for d in TOKEN_DTYPES.values())}"
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return GPT-NeoX's choice of type: uint16 for fewer than 65,500 words, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")
