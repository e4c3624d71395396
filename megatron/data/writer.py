"""Writing tokens: a ``.bin/.idx`` pair that exists whole or not at all, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.data.index_format import (
    HEADER_BYTES,
    MAX_DOCUMENT_TOKENS,
    SIZE_BYTES,
    IndexHeader,
    dtype_code,
)
from megatron.data.reader import TokenReader
from megatron.data.sidecar import sidecar_path
from megatron.errors import DataError, RunError

_BLOCK_DOCUMENTS = 1 << 18
_BLOCK_BYTES = 8 << 20


class TokenWriter:
    """Writes documents into ``PREFIX.bin.tmp`` and ``PREFIX.idx.tmp``; :meth:`close` names them.

    A context manager: leaving the block normally closes, leaving it by an exception aborts
    (and deletes, unless ``keep_partial``).  Sizes go to disk as they come, so memory does not
    grow with the number of documents.  The index is byte-identical to that of GPT-NeoX's
    ``preprocess_data.py``: every document one sequence, ``doc_idx`` = 0, 1, …, N.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype[Any] | type[Any] | str,
        *,
        resume: tuple[int, int] | None = None,
        keep_partial: bool = False,
    ) -> None:
        """Start a dataset, or go on with one that was interrupted.

        Args:
            prefix: path without ``.bin``; its folder is made if it is missing.
            dtype: token type, see :func:`~megatron.data.index_format.token_dtype`.
            resume: ``(documents, tokens)`` as :meth:`flush` returned them; the temporary files
                are cut back to that point and continued.
            keep_partial: keep the temporary files when aborted, for a later ``resume``.

        Raises:
            DataError: the type has no code, or ``resume`` tells of more than the files hold.
            RunError: the files cannot be written.
        """
        self.prefix = os.fspath(prefix)
        self.dtype: np.dtype[Any] = np.dtype(dtype).newbyteorder("<")
        dtype_code(self.dtype)
        self._keep_partial = keep_partial
        self._bin_tmp, self._idx_tmp = self.prefix + ".bin.tmp", self.prefix + ".idx.tmp"
        self.num_documents, self.num_tokens = resume or (0, 0)
        self._closed = False
        with _disk_errors(self.prefix):
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            mode = "wb" if resume is None else "r+b"
            self._bin: IO[bytes] = open(self._bin_tmp, mode, buffering=_BLOCK_BYTES)  # noqa: SIM115
            self._idx: IO[bytes] = open(self._idx_tmp, mode, buffering=1 << 20)  # noqa: SIM115
            if resume is None:
                self._idx.write(bytes(HEADER_BYTES))
            else:
                self._cut_back()

    def __enter__(self) -> TokenWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close after success, abort after an exception."""
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, tokens: ArrayLike) -> None:
        """Append one document.

        Raises:
            DataError: a token does not fit the type, or the document has 2³¹ tokens or more.
            RunError: the disk is full.
        """
        array = np.asarray(tokens)
        self.add_many(array, (array.size,))

    def add_many(self, tokens: ArrayLike, lengths: ArrayLike) -> None:
        """Append several documents, laid end to end.

        Args:
            tokens: flat array of all their tokens.
            lengths: tokens per document; their sum is the length of ``tokens``.

        Raises:
            DataError: a token does not fit the type, or a document has 2³¹ tokens or more.
            RunError: the disk is full.
        """
        flat = self._as_stored(np.asarray(tokens))
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any() or int(sizes.sum()) != flat.size:
            raise ValueError(f"lengths sum to {sizes.sum()}, there are {flat.size} tokens")
        if sizes.size and int(sizes.max()) > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{self.prefix}: a document of {sizes.max()} tokens; the format's limit is "
                f"{MAX_DOCUMENT_TOKENS}: split it"
            )
        with _disk_errors(self.prefix):
            self._bin.write(flat.data)
            self._idx.write(sizes.astype("<i4").tobytes())
        self.num_documents += sizes.size
        self.num_tokens += flat.size

    def add_file(self, reader: TokenReader) -> None:
        """Append all documents of another dataset of the same type, copying bytes in blocks.

        Raises:
            DataError: the types differ.
            RunError: the disk is full.
        """
        if reader.dtype != self.dtype:
            raise DataError(
                f"{reader.prefix}: tokens are {reader.dtype.name}, {self.prefix} holds "
                f"{self.dtype.name}; datasets are merged only if tokenised alike"
            )
        step = _BLOCK_BYTES // self.dtype.itemsize
        with _disk_errors(self.prefix):
            for start in range(0, reader.num_tokens, step):
                block = reader.read(start, min(start + step, reader.num_tokens))
                self._bin.write(block.data)
            for first in range(0, reader.num_documents, _BLOCK_DOCUMENTS):
                last = min(first + _BLOCK_DOCUMENTS, reader.num_documents)
                self._idx.write(reader.document_sizes(first, last).tobytes())
        self.num_documents += reader.num_documents
        self.num_tokens += reader.num_tokens

    def flush(self) -> tuple[int, int]:
        """Make everything so far durable; return ``(documents, tokens)`` to resume from."""
        with _disk_errors(self.prefix):
            for file in (self._bin, self._idx):
                file.flush()
                os.fsync(file.fileno())
        return self.num_documents, self.num_tokens

    def close(self) -> None:
        """Finish the index, make both files durable and give them their names, the index last.

        Older files of the prefix go first, index and sidecar before anything is renamed, so at
        no moment does an old index stand beside a new ``.bin``.
        """
        if self._closed:
            return
        with _disk_errors(self.prefix):
            self._finish_index()
            self.flush()
            self._bin.close()
            self._idx.close()
            self._closed = True
            sidecar_path(self.prefix).unlink(missing_ok=True)
            Path(self.prefix + ".idx").unlink(missing_ok=True)
            os.replace(self._bin_tmp, self.prefix + ".bin")
            os.replace(self._idx_tmp, self.prefix + ".idx")
            _sync_folder(Path(self.prefix).parent)

    def abort(self) -> None:
        """Stop without a dataset: the temporary files are deleted, or kept for a resume."""
        if self._closed:
            return
        self._closed = True
        for file, path in ((self._bin, self._bin_tmp), (self._idx, self._idx_tmp)):
            with suppress(OSError):  # a full disk: what could not be written is given up
                file.close()
            if not self._keep_partial:
                Path(path).unlink(missing_ok=True)

    def _as_stored(self, tokens: NDArray[Any]) -> NDArray[Any]:
        flat = tokens.reshape(-1)
        if flat.dtype == self.dtype:
            return np.ascontiguousarray(flat)
        if flat.size == 0:
            return np.empty(0, dtype=self.dtype)
        if flat.dtype.kind not in "iu":
            raise DataError(f"{self.prefix}: token ids are integers, not {flat.dtype}")
        limits = np.iinfo(self.dtype)
        low, high = int(flat.min()), int(flat.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"{self.prefix}: token id {low if low < limits.min else high} does not fit "
                f"{self.dtype.name}; choose the type by the tokenizer's vocabulary"
            )
        return flat.astype(self.dtype)

    def _cut_back(self) -> None:
        for file, size in (
            (self._bin, self.num_tokens * self.dtype.itemsize),
            (self._idx, HEADER_BYTES + SIZE_BYTES * self.num_documents),
        ):
            if os.fstat(file.fileno()).st_size < size:
                raise DataError(f"{file.name}: shorter than the point to resume from; start again")
            file.truncate(size)
            file.seek(size)

    def _finish_index(self) -> None:
        """Append pointers and doc_idx behind the sizes, then write the header in front."""
        self._idx.flush()
        position = 0
        with open(self._idx_tmp, "rb") as written:
            written.seek(HEADER_BYTES)
            for first in range(0, self.num_documents, _BLOCK_DOCUMENTS):
                count = min(_BLOCK_DOCUMENTS, self.num_documents - first)
                sizes = np.frombuffer(written.read(SIZE_BYTES * count), dtype="<i4")
                ends = position + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
                starts = ends - sizes.astype(np.int64) * self.dtype.itemsize
                self._idx.write(starts.astype("<i8").tobytes())
                position = int(ends[-1])
        for first in range(0, self.num_documents + 1, _BLOCK_DOCUMENTS):
            last = min(first + _BLOCK_DOCUMENTS, self.num_documents + 1)
            self._idx.write(np.arange(first, last, dtype="<i8").tobytes())
        self._idx.seek(0)
        header = IndexHeader(
            dtype=self.dtype,
            documents=self.num_documents,
            doc_idx_length=self.num_documents + 1,
        )
        self._idx.write(header.pack())


def merge(prefixes: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Join datasets of one token type into one, in the order given, without decoding anything.

    Args:
        prefixes: the datasets; each is checked as by :class:`TokenReader`.
        out: prefix to write, atomically; must not be one of ``prefixes``.

    Raises:
        DataError: a dataset is unsound, types differ, or ``out`` is an input.
        RunError: the disk is full.
    """
    if not prefixes:
        raise DataError("nothing to merge: give at least one prefix")
    target = os.path.realpath(os.fspath(out))
    if target in {os.path.realpath(os.fspath(prefix)) for prefix in prefixes}:
        raise DataError(f"{out}: is both an input and the output of the merge; give another output")
    with TokenReader(prefixes[0]) as first:
        dtype = first.dtype
    with TokenWriter(out, dtype) as writer:
        for prefix in prefixes:
            with TokenReader(prefix) as reader:
                writer.add_file(reader)


@contextmanager
def _disk_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or prefix}: cannot be written: {error.strerror or error}; "
            "free disk space or choose another output"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
