"""Reading tokens: open a ``.bin/.idx`` pair in constant time, and refuse a pair that is not sound.

Tokens are fetched with ``pread`` rather than through a mapping: a file that shrinks
under a running job then gives an error instead of SIGBUS, a window costs one system
call instead of one page fault per 4 KiB, and resident memory does not grow with use.
The index is mapped, because a binary search touches few of its pages; neither file is
ever read whole.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_format import POINTER_BYTES
from megatron.data.opening import map_index, open_file
from megatron.data.sidecar import Sidecar, read_sidecar, sidecar_path
from megatron.errors import DataError

_SAMPLED_DOCUMENTS = 33
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_BYTES = 4096
_FINGERPRINT_WHOLE_BYTES = 4 << 20
_POINTER = struct.Struct("<q")
_SIZES = {4: struct.Struct("<i"), 8: struct.Struct("<q")}


class TokenReader:
    """The documents of one prefix, seen as one stream of tokens.

    Sequences of the index are the documents, as in GPT-NeoX; ``doc_idx`` is checked, not used.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Open ``PREFIX.idx`` and ``PREFIX.bin`` and check that they belong together.

        Checked, at a cost that does not grow with the files: magic, version, type code, the
        exact size of both files, the ends of ``doc_idx``, the last non-empty document, and
        that pointers and sizes agree at places spread over the index.

        Raises:
            DataError: a file is missing, truncated, foreign, or does not fit the other.
        """
        self.prefix = os.fspath(prefix)
        self._idx_path, self._bin_path = self.prefix + ".idx", self.prefix + ".bin"
        self._fd, self._bin_bytes = open_file(self._bin_path, self.prefix)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            self._index, self._header = map_index(self._idx_path, self.prefix)
            self.dtype: np.dtype[Any] = self._header.dtype
            self._itemsize = self.dtype.itemsize
            # A one- or two-byte signed type has an unsigned twin of the same size: only the
            # values can tell a damaged type code there.
            self._check_sign = self.dtype.kind == "i" and self._itemsize < 4
            self.num_documents: int = self._header.documents
            self.num_tokens: int = self._bin_bytes // self._itemsize
            self._check_ends()
            self._check_sampled_documents()
            self.sidecar: Sidecar | None = read_sidecar(self.prefix)
            self._check_sidecar()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return (
            f"TokenReader({self.prefix!r}, {self.dtype.name}, {self.num_documents} documents, "
            f"{self.num_tokens} tokens)"
        )

    def __enter__(self) -> TokenReader:
        """Return the reader; :meth:`close` runs at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()

    def close(self) -> None:
        """Close the files; reading afterwards is an error.  May be called twice."""
        self._close()
        index: mmap.mmap | None = getattr(self, "_index", None)
        if index is not None:
            index.close()

    @property
    def legacy(self) -> bool:
        """Whether the index is of the older format (``cached``, ``lazy``)."""
        return self._header.legacy

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, from the sidecar; ``None`` without one."""
        return self.sidecar.bytes_per_token if self.sidecar else None

    def document_size(self, document: int) -> int:
        """Return a document's length in tokens."""
        width = self._header.size_bytes
        at = self._header.sizes_at + width * document
        value: int = _SIZES[width].unpack_from(self._index, at)[0]
        return value

    def document_start(self, document: int) -> int:
        """Return the position of a document's first token; ``num_documents`` gives the end."""
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        pointer = self._pointer(document)
        if not 0 <= pointer <= self._bin_bytes or pointer % self._itemsize:
            self._refuse_document(document)
        return pointer // self._itemsize

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at position ``token`` (binary search)."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} of {self.num_tokens} in {self.prefix}")
        return self.documents_before(token + 1) - 1

    def documents_before(self, token: int) -> int:
        """Return how many documents start before position ``token``."""
        # Not np.searchsorted: on an unaligned mapping it copies the whole array first.
        target, low, high = token * self._itemsize, 0, self.num_documents
        target //= self._header.pointer_unit
        at, index = self._header.pointers_at, self._index
        while low < high:
            middle = (low + high) // 2
            if _POINTER.unpack_from(index, at + POINTER_BYTES * middle)[0] < target:
                low = middle + 1
            else:
                high = middle
        return low

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the distinct positions in ``[start, stop)`` at which documents start, ascending.

        Raises:
            DataError: the index is damaged there.
        """
        first, last = self.documents_before(start), self.documents_before(stop)
        pointers = self._array(
            "<i8", self._header.pointers_at + POINTER_BYTES * first, last - first
        )
        pointers = pointers * self._header.pointer_unit
        starts: NDArray[np.int64] = np.unique(pointers // self._itemsize)
        if starts.size and (starts[0] < start or starts[-1] >= stop):
            raise DataError(f"{self._idx_path}: damaged: document pointers are not ascending")
        return starts

    def document_sizes(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the lengths in tokens of documents ``[start, stop)``."""
        at = self._header.sizes_at + self._header.size_bytes * start
        sizes = self._array(self._header.size_dtype, at, stop - start)
        return sizes.astype(np.int32, copy=False)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of tokens ``[start, stop)`` in the type of the file.

        Raises:
            DataError: the file has become shorter, cannot be read, or holds negative ids.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")
        tokens = np.empty(stop - start, dtype=self.dtype)
        self.read_into(tokens, start)
        return tokens

    def read_into(self, out: NDArray[Any], start: int) -> None:
        """Fill ``out`` (contiguous, of the file's type) with tokens from ``start`` on.

        Raises:
            DataError: the file has become shorter, cannot be read, or holds negative ids.
        """
        want, offset = out.nbytes, start * self._itemsize
        try:
            got = os.preadv(self._fd, (out.data,), offset)
            if got != want:  # the kernel gives at most 2 GiB at once, and less at the end
                got = self._read_rest(out, got, offset)
        except OSError as error:
            raise DataError(f"{self._bin_path}: cannot be read: {error.strerror}") from error
        if got != want:
            raise DataError(
                f"{self._bin_path}: shrank while in use: it no longer reaches byte {offset + want}"
            )
        if self._check_sign and out.size and int(out.min()) < 0:
            raise DataError(
                f"{self._bin_path}: negative token ids near token {start}: "
                f"type code {self.dtype.name} of the index is wrong, or the file is damaged"
            )

    def will_need(self, start: int, stop: int) -> None:
        """Tell the kernel that tokens ``[start, stop)`` will be read soon; returns at once."""
        if hasattr(os, "posix_fadvise"):
            offset, length = start * self._itemsize, (stop - start) * self._itemsize
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """Return a hash that depends on the files' contents, not on their place or date.

        Files up to 4 MiB are hashed whole, larger ones at 64 blocks spread over them together
        with their sizes: cheap on any size, and sensitive to other documents, another
        tokenizer or another order.  A changed byte between blocks is for ``--verify``.
        """
        digest = hashlib.sha256(b"neomix tokens 1")
        index = self._index
        _hash_spread(digest, len(index), lambda at, count: index[at : at + count])
        _hash_spread(digest, self._bin_bytes, lambda at, count: os.pread(self._fd, count, at))
        return digest.hexdigest()

    def verify_index(self, block: int = 1 << 20) -> None:
        """Check every document's pointer against the sizes before it, block by block.

        Raises:
            DataError: naming the first document whose pointer, size or doc_idx entry is wrong.
        """
        expected = 0
        for first in range(0, self.num_documents, block):
            last = min(first + block, self.num_documents)
            sizes = self.document_sizes(first, last).astype(np.int64)
            at = self._header.pointers_at + POINTER_BYTES * first
            pointers = self._array("<i8", at, last - first) * self._header.pointer_unit
            ends = expected + np.cumsum(sizes) * self._itemsize
            wrong = (pointers != ends - sizes * self._itemsize) | (sizes < 0)
            if wrong.any():
                self._refuse_document(first + int(np.argmax(wrong)))
            expected = int(ends[-1])
        if expected != self._bin_bytes:
            self._refuse_bin(expected)
        self._verify_doc_idx(block)

    def _verify_doc_idx(self, block: int) -> None:
        length, at = self._header.doc_idx_length, self._header.doc_idx_at
        before = -1
        for first in range(0, length, block):
            count = min(block, length - first)
            entries = self._array("<i8", at + POINTER_BYTES * first, count)
            if length == self.num_documents + 1:
                wrong = entries != np.arange(first, first + count)
            else:  # written with sentences as sequences, or merged by old tools
                steps = np.diff(entries, prepend=before)
                wrong = (steps <= 0) | (entries > self.num_documents)
            if wrong.any():
                raise DataError(
                    f"{self._idx_path}: damaged: doc_idx is wrong at entry "
                    f"{first + int(np.argmax(wrong))}"
                )
            before = int(entries[-1])

    def _pointer(self, document: int) -> int:
        if document == self.num_documents:
            return self._bin_bytes
        at = self._header.pointers_at + POINTER_BYTES * document
        value: int = _POINTER.unpack_from(self._index, at)[0]
        return value * self._header.pointer_unit

    def _array(self, dtype: str, at: int, count: int) -> NDArray[Any]:
        # A copy: an array over the mapping would keep it from closing.
        itemsize = np.dtype(dtype).itemsize
        return np.frombuffer(self._index[at : at + count * itemsize], dtype=dtype).copy()

    def _read_rest(self, out: NDArray[Any], got: int, offset: int) -> int:
        rest = out.data.cast("B")
        while 0 < got < out.nbytes:
            more = os.preadv(self._fd, (rest[got:],), offset + got)
            if more == 0:
                break
            got += more
        return got

    def _check_ends(self) -> None:
        header, expected = self._header, self._header.file_bytes
        if len(self._index) != expected:
            state = "truncated" if len(self._index) < expected else "too long"
            raise DataError(
                f"{self._idx_path}: {state}: {len(self._index)} bytes, its header asks for "
                f"{expected} ({header.documents} documents); copy or preprocess it again"
            )
        if header.doc_idx_length < 1:
            raise DataError(f"{self._idx_path}: damaged: doc_idx is empty")
        first = _POINTER.unpack_from(self._index, header.doc_idx_at)[0]
        last = _POINTER.unpack_from(self._index, header.file_bytes - POINTER_BYTES)[0]
        # Merging with old Megatron tools leaves doc_idx = [0]; training never used it.
        if first != 0 or (last != header.documents and header.doc_idx_length != 1):
            raise DataError(
                f"{self._idx_path}: damaged: doc_idx runs from {first} to {last}, "
                f"not from 0 to {header.documents}"
            )
        if header.documents == 0:
            if self._bin_bytes:
                self._refuse_bin(0)
            return
        last_document = header.documents - 1
        size, pointer = self.document_size(last_document), self._pointer(last_document)
        if pointer < 0 or size < 0:
            self._refuse_document(last_document)
        if pointer + size * self._itemsize != self._bin_bytes:
            self._refuse_bin(pointer + size * self._itemsize)

    def _check_sampled_documents(self) -> None:
        count = self.num_documents
        if not count:
            return
        if self._pointer(0) != 0:
            self._refuse_document(0)
        spread = {i * (count - 1) // (_SAMPLED_DOCUMENTS - 1) for i in range(_SAMPLED_DOCUMENTS)}
        # The last document that holds anything: its length in bytes tells the token type
        # even if every document seen otherwise is empty.
        spread.add(max(self.documents_before(self.num_tokens) - 1, 0))
        for document in sorted(spread):
            pointer, size = self._pointer(document), self.document_size(document)
            end = self._pointer(document + 1)
            if pointer < 0 or size < 0 or pointer + size * self._itemsize != end:
                self._refuse_document(document)

    def _check_sidecar(self) -> None:
        if self.sidecar is None:
            return
        for what, told, found in (
            ("documents", self.sidecar.documents, self.num_documents),
            ("tokens", self.sidecar.tokens, self.num_tokens),
            ("dtype", self.sidecar.dtype, self.dtype.name),
            ("bytes in the .bin", self.sidecar.bin.size, self._bin_bytes),
            ("bytes in the .idx", self.sidecar.idx.size, len(self._index)),
        ):
            if told != found:
                raise DataError(
                    f"{sidecar_path(self.prefix)}: does not belong to this dataset: it tells of "
                    f"{what} {told}, the files have {found}; preprocess again, or delete it if "
                    "the dataset is the right one"
                )

    def _refuse_document(self, document: int) -> None:
        raise DataError(
            f"{self._idx_path}: damaged: pointer, size or token type ({self.dtype.name}) is wrong "
            f"at document {document} of {self.num_documents}; copy or preprocess it again"
        )

    def _refuse_bin(self, expected: int) -> None:
        state = "truncated" if self._bin_bytes < expected else "too long"
        raise DataError(
            f"{self._bin_path}: {state}, or not the file of this index: {self._bin_bytes} bytes, "
            f"{self._idx_path} ({self.dtype.name}) asks for {expected}; "
            "copy or preprocess both again"
        )


def _hash_spread(digest: hashlib._Hash, size: int, read: Callable[[int, int], bytes]) -> None:
    digest.update(size.to_bytes(8, "little"))
    if size <= _FINGERPRINT_WHOLE_BYTES:
        digest.update(read(0, size))
        return
    step = (size - _FINGERPRINT_BLOCK_BYTES) / (_FINGERPRINT_BLOCKS - 1)
    for block in range(_FINGERPRINT_BLOCKS):
        digest.update(read(int(block * step), _FINGERPRINT_BLOCK_BYTES))
