"""Tokenizers with a library or a rule of their own: sentencepiece, tiktoken, bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import DataError, MissingExtraError, did_you_mean
from megatron.tokenizer.base import (
    EOD_CANDIDATES,
    EOD_TOKEN,
    Tokenizer,
    digest,
    missing_eod,
    read_vocabulary,
)
from megatron.tokenizer.pattern import GPT2_PATTERN

_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A tiktoken file holds ranks only; how text is split, and the id of the end of a document,
# follow from which of the published vocabularies it is, told by its size.
_KNOWN_FILES = {
    50280: (GPT2_PATTERN, 50256),
    100256: (_CL100K_PATTERN, 100257),
    128000: (_LLAMA3_PATTERN, 128001),
    199998: (_O200K_PATTERN, 199999),
}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, path: str | None, name: str) -> None:
        """Open the model.

        Raises:
            DataError: not given, missing, or not a model.
        """
        content = read_vocabulary(path, name, "a sentencepiece model", "vocab_file")
        try:
            import sentencepiece
        except ImportError:
            raise MissingExtraError("sentencepiece", "train", name) from None
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise DataError(f"{path}: not a sentencepiece model: {error}") from None
        self.name, self.sha256, self._path = name, digest(content), path

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._model.get_piece_size())

    @cached_property
    def eod(self) -> int:
        """Id of ``<|endoftext|>``, or of the model's own end-of-sentence piece."""
        for candidate in EOD_CANDIDATES:
            found = int(self._model.piece_to_id(candidate))
            if found >= 0 and self._model.id_to_piece(found) == candidate:
                return found
        if self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        raise missing_eod(self.name, self._path)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._model.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode([int(i) for i in ids]))


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding, by its name or from its file of ranks."""

    def __init__(self, vocab_file: str | None, name: str) -> None:
        """Open the encoding.

        Raises:
            DataError: neither a file nor a name that tiktoken knows and has at hand.
        """
        if not vocab_file:
            raise DataError(
                f"{name} needs an encoding's name or a .tiktoken file: set vocab_file "
                "(--vocab-file)"
            )
        try:
            import tiktoken
        except ImportError:
            raise MissingExtraError("tiktoken", "train", name) from None
        self.name = name
        if Path(vocab_file).exists() or "/" in vocab_file or vocab_file.endswith(".tiktoken"):
            content = read_vocabulary(vocab_file, name, "a .tiktoken file", "vocab_file")
            self._encoding = _encoding_from_ranks(content, vocab_file)
            self.sha256 = digest(content)
            return
        self._encoding = _named_encoding(vocab_file, tiktoken)
        self.sha256 = digest(f"tiktoken:{vocab_file}:{self._encoding.n_vocab}".encode())

    @property
    def encoding(self) -> Any:
        """The library's own encoding, to be written into other formats."""
        return self._encoding

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._encoding.n_vocab)

    @property
    def eod(self) -> int:
        """Id of ``<|endoftext|>``."""
        return int(self._encoding.eot_token)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens by name are recognised."""
        return list(self._encoding.encode(text, allowed_special="all"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return str(self._encoding.decode([int(i) for i in ids], errors="replace"))

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        special = {self._encoding.encode_single_token(t) for t in self._encoding.special_tokens_set}
        return self.decode([i for i in ids if i not in special])


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids; 512 ids and end of document 0, as GPT-NeoX's CharLevelTokenizer."""

    def __init__(self, name: str) -> None:
        """Make the tokenizer; it needs no file."""
        self.name = name
        self.sha256 = digest(b"CharLevelTokenizer:512")

    @property
    def vocab_size(self) -> int:
        """512; bytes use the first half."""
        return 512

    @property
    def eod(self) -> int:
        """0: the byte that text does not hold."""
        return 0

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes; ids beyond 255 are no bytes and are left out."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def encode_raw(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        """Return the bytes of each text, widened to ``dtype``."""
        return [
            np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(dtype).tobytes()
            for text in texts
        ]


def _named_encoding(encoding: str, tiktoken: Any) -> Any:
    known = tiktoken.list_encoding_names()
    if encoding not in known:
        raise DataError(
            f"vocab_file '{encoding}': neither a file nor an encoding that tiktoken knows"
            f"{did_you_mean(encoding, known)} (known: {', '.join(known)})"
        )
    try:
        return tiktoken.get_encoding(encoding)
    except Exception as error:
        raise DataError(
            f"the tiktoken encoding '{encoding}' is not on this machine and cannot be downloaded "
            f"({type(error).__name__}); set vocab_file to its .tiktoken file"
        ) from None


def _encoding_from_ranks(content: bytes, path: str) -> Any:
    import tiktoken

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}, line {number}: not a .tiktoken file (a base64 token and its rank a line)"
            ) from None
    if not all(bytes((byte,)) in ranks for byte in range(256)):
        raise DataError(f"{path}: not a .tiktoken file: it lacks some of the 256 single bytes")
    after = max(ranks.values()) + 1
    pattern, eod = _KNOWN_FILES.get(len(ranks), (GPT2_PATTERN, after))
    try:
        return tiktoken.Encoding(
            Path(path).name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOD_TOKEN: eod}
        )
    except Exception as error:
        raise DataError(f"{path}: not a usable .tiktoken file: {error}") from None
