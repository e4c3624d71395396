"""Tokenizers of the ``tokenizers`` library: a tokenizer.json, or GPT-2's vocab and merges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.errors import DataError, MissingExtraError
from megatron.tokenizer.base import (
    EOD_CANDIDATES,
    EOD_TOKEN,
    Tokenizer,
    digest,
    missing_eod,
    read_vocabulary,
)
from megatron.tokenizer.bytelevel import parse_byte_level
from megatron.tokenizer.fast import FastEncoder
from megatron.tokenizer.pattern import NotUnderstoodError

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizers.Tokenizer``, with a faster encoder where that is verified to be equal.

    Single texts go through ``tokenizers``.  Bulk encoding goes through
    :class:`~megatron.tokenizer.fast.FastEncoder` if the file is a byte-level BPE whose parts
    are all understood and both give the same ids on a varied set of texts, and otherwise
    through ``tokenizers`` as well.  Padding and truncation sections of a file are not applied:
    a corpus is never cut.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        name: str,
        sha256: str,
        source: str,
        fast: bool = True,
    ) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: changed here: padding and truncation are switched off.
            name: its ``tokenizer_type``.
            sha256: hash of its files.
            source: path, for messages.
            fast: False keeps bulk encoding on ``tokenizers`` too.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.name = name
        self.sha256 = sha256
        self._source = source
        self._want_fast = fast

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest, so that every id fits the embedding."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(max(ids, default=-1) + 1, self._tokenizer.get_vocab_size())

    @cached_property
    def eod(self) -> int:
        """Id of ``<|endoftext|>``, or of what the vocabulary calls it."""
        for candidate in EOD_CANDIDATES:
            found = self._tokenizer.token_to_id(candidate)
            if found is not None:
                return int(found)
        raise missing_eod(self.name, self._source)

    @cached_property
    def bos(self) -> int:
        """Id of ``bos_token`` (or else ``eos_token``) of tokenizer_config.json, or ``eod``."""
        return self._named("bos_token", "eos_token")

    @cached_property
    def eos(self) -> int:
        """Id of ``eos_token`` of the tokenizer_config.json beside the file, or ``eod``."""
        return self._named("eos_token")

    def _named(self, *keys: str) -> int:
        """Return the id of the first of these that tokenizer_config.json names, or ``eod``."""
        for key in keys:
            token = self._settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            found = None if token is None else self._tokenizer.token_to_id(token)
            if found is not None:
                return int(found)
        return self.eod

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What transformers reads beside a tokenizer.json; empty where there is none."""
        source = Path(self._source)
        if source.name != "tokenizer.json":
            return {}
        try:
            found = json.loads((source.parent / "tokenizer_config.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The library's own tokenizer, to be written into other formats; not to be changed."""
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._tokenizer.encode(text).ids)

    def encode_bare(self, text: str) -> list[int]:
        """Return the ids of a text without tokens that stand around every text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        kept = [i for i in ids if i not in (self.eod, self.bos, self.eos)]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @property
    def encoder(self) -> str:
        """Which implementation encodes in bulk, and why."""
        encoder, reason = self._bulk
        if encoder is None:
            return f"tokenizers ({reason})"
        return (
            f"fast byte-level BPE (merging by {encoder.backend}; "
            f"verified on {encoder.verified_texts} texts)"
        )

    def encode_raw(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        """Return the ids of each text as bytes of ``dtype``."""
        encoder, _ = self._bulk
        if encoder is not None:
            try:
                return encoder.encode_raw(texts, dtype)
            except NotUnderstoodError as error:
                self._bulk = (None, str(error))
        return self.encode_raw_by_library(texts, dtype)

    def encode_raw_by_library(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        """Like :meth:`encode_raw`, always by ``tokenizers``: the reference."""
        encoded = self._tokenizer.encode_batch_fast(list(texts))
        return [np.asarray(one.ids, dtype=dtype).tobytes() for one in encoded]

    @cached_property
    def _bulk(self) -> tuple[FastEncoder | None, str]:
        """The fast encoder or None, and the reason."""
        if not self._want_fast:
            return None, "as asked"
        try:
            parts = parse_byte_level(self._tokenizer.to_str())
            encoder = FastEncoder(parts, self._tokenizer, self.encode_raw_by_library)
        except NotUnderstoodError as error:
            return None, str(error)
        return encoder, ""


def from_tokenizer_json(path: str | None, name: str, *, fast: bool) -> HuggingFaceTokenizer:
    """Open a tokenizer.json.

    Raises:
        DataError: not given, missing, or not a tokenizer.
    """
    content = read_vocabulary(path, name, "a tokenizer.json", "vocab_file")
    tokenizer = _parse(content, str(path))
    return HuggingFaceTokenizer(
        tokenizer, name=name, sha256=digest(content), source=str(path), fast=fast
    )


def from_vocab_and_merges(
    vocab_file: str | None, merge_file: str | None, name: str, *, fast: bool
) -> HuggingFaceTokenizer:
    """Open GPT-2's pair of files, as GPT-NeoX's GPT2BPETokenizer reads them.

    Raises:
        DataError: not given, missing, or not such a pair.
    """
    vocab = read_vocabulary(vocab_file, name, "a vocab.json", "vocab_file")
    merges = read_vocabulary(merge_file, name, "a merges.txt", "merge_file")
    tokenizer = _gpt2(vocab, merges, f"{vocab_file}, {merge_file}")
    return HuggingFaceTokenizer(
        tokenizer, name=name, sha256=digest(vocab, merges), source=str(vocab_file), fast=fast
    )


def from_pretrained_gpt2(path: str | None, name: str, *, fast: bool) -> HuggingFaceTokenizer:
    """Open GPT-2's tokenizer from a folder, a tokenizer.json or the Hugging Face hub.

    As in GPT-NeoX, ``<|padding|>`` is added, and no path means the hub's ``gpt2``.

    Raises:
        DataError: nothing of the kind there, or the hub cannot be reached.
    """
    folder = Path(path or "gpt2")
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        files = [str(folder / file) for file in ("vocab.json", "merges.txt")]
        opened = from_vocab_and_merges(files[0], files[1], name, fast=fast)
    elif folder.exists():
        file = folder / "tokenizer.json" if folder.is_dir() else folder
        opened = from_tokenizer_json(str(file), name, fast=fast)
    else:
        opened = _from_hub(str(folder), name, fast=fast)
    opened._tokenizer.add_special_tokens(["<|padding|>"])
    return opened


def _from_hub(repository: str, name: str, *, fast: bool) -> HuggingFaceTokenizer:
    try:
        tokenizer = _library("Tokenizer").from_pretrained(repository)
    except Exception as error:
        raise DataError(
            f"{repository}: no such file or folder, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}); set vocab_file to a folder with vocab.json and merges.txt"
        ) from None
    content = tokenizer.to_str().encode()
    return HuggingFaceTokenizer(
        tokenizer, name=name, sha256=digest(content), source=repository, fast=fast
    )


def _gpt2(vocab: bytes, merges: bytes, source: str) -> tokenizers.Tokenizer:
    from_library: type[tokenizers.Tokenizer] = _library("Tokenizer")
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    try:
        vocabulary = json.loads(vocab)
        lines = merges.decode("utf-8").split("\n")
        pairs = [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]
        model = models.BPE(vocab=vocabulary, merges=pairs)
    except Exception as error:
        raise DataError(f"{source}: not a GPT-2 vocabulary and merges: {error}") from None
    tokenizer = from_library(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if EOD_TOKEN in vocabulary:
        tokenizer.add_special_tokens([AddedToken(EOD_TOKEN, normalized=False, special=True)])
    return tokenizer


def _pair(line: str) -> tuple[str, str]:
    left, right = line.rstrip("\r").split(" ")
    return left, right


def _parse(content: bytes, path: str) -> tokenizers.Tokenizer:
    library: type[tokenizers.Tokenizer] = _library("Tokenizer")
    try:
        return library.from_str(content.decode("utf-8"))
    except Exception as error:  # the binding raises Exception itself
        raise DataError(f"{path}: not a tokenizer.json: {error}") from None


def _library(name: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers", "train", "a Hugging Face tokenizer") from None
    return getattr(tokenizers, name)
