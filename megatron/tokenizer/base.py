"""What every tokenizer offers, whatever library stands behind it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError

EOD_TOKEN = "<|endoftext|>"
# A tokenizer made for another family has its own name for the end of a document.
EOD_CANDIDATES = (EOD_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: the ``tokenizer_type`` it was built as.
        sha256: hash (hex) of the vocabulary's files: equal hashes, equal ids.
    """

    name: str
    sha256: str

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, unpadded."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id that ends a document.

        Raises:
            DataError: the vocabulary has no such token.
        """

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; tokens that the vocabulary adds by name are recognised."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""

    @property
    def bos(self) -> int:
        """Id that stands before a text without a context: of its own, or else :attr:`eod`."""
        return self.eod

    @property
    def eos(self) -> int:
        """Id that ends an answer: what the vocabulary's settings say, or else :attr:`eod`."""
        return self.eod

    def encode_bare(self, text: str) -> list[int]:
        """Return the ids of a text without tokens that stand around every text."""
        return self.encode(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of ids; tokens that are no text are left out."""
        return self.decode([i for i in ids if i not in (self.eod, self.bos, self.eos)])

    @property
    def encoder(self) -> str:
        """Which implementation encodes in bulk, and why (one line, for the log)."""
        return self.name

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text."""
        dtype = np.dtype("<i4")
        return [np.frombuffer(raw, dtype=dtype) for raw in self.encode_raw(texts, dtype)]

    def encode_raw(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        """Return the ids of each text as the bytes of a ``.bin`` of that type.

        Args:
            texts: the documents.
            dtype: little-endian ``uint16`` or ``int32``; every id of the vocabulary must fit.
        """
        return [np.asarray(self.encode(text), dtype=dtype).tobytes() for text in texts]


def read_vocabulary(path: str | None, tokenizer_type: str, what: str, option: str) -> bytes:
    """Read a vocabulary file.

    Args:
        path: the file, or None if the user gave none.
        tokenizer_type: named in messages.
        what: what the file holds ("a tokenizer.json").
        option: the option that names it ("vocab_file").

    Raises:
        DataError: it was not given, does not exist or cannot be read.
    """
    if not path:
        raise DataError(
            f"{tokenizer_type} needs {what}: set {option} (--{option.replace('_', '-')})"
        )
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file ({option} of {tokenizer_type}: {what}); train one with "
            "tools/train_tokenizer.py, or correct the path"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({option}): {error.strerror}") from None
    if not content:
        raise DataError(f"{path}: empty file; {tokenizer_type} needs {what}")
    return content


def digest(*contents: bytes) -> str:
    """Return the SHA-256 (hex) of several files' contents, lengths included."""
    total = hashlib.sha256()
    for content in contents:
        if len(contents) > 1:
            total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def missing_eod(tokenizer_type: str, path: str | None) -> DataError:
    """Return the error for a vocabulary without an end-of-document token."""
    return DataError(
        f"{path or tokenizer_type}: the vocabulary has no end-of-document token (looked for "
        f"{', '.join(EOD_CANDIDATES)}); add '{EOD_TOKEN}' to it, or leave out append_eod"
    )
