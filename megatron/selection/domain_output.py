"""Chosen documents as a domain: ``.bin/.idx`` with a sidecar, labels of conversations beside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron.data.index_format import token_dtype
from megatron.data.ingest.pipeline import dataset_prefix, preprocess
from megatron.data.ingest.records import parse_json
from megatron.data.ingest.settings import PreprocessSettings
from megatron.data.ingest.stamps import stamp
from megatron.data.sidecar import Sidecar, write_sidecar
from megatron.data.writer import TokenWriter
from megatron.errors import DataError
from megatron.selection.base import Document, Say
from megatron.selection.choose import Places
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.records import ID, TEXT, content
from megatron.selection.token_counts import ChatEncoder, Encoder, PlainEncoder
from megatron.selection.token_part import TokenPart
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.chat import chat_tokenizer

_CHUNK: Final = 25


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """A tokenizer by what the command line says of it; picklable.

    Attributes:
        kind: ``tokenizer_type``; None if there is none.
        vocab_file: of it.
        merge_file: of it.
        chat_path: folder of a tokenizer with a chat template, for conversations.
    """

    kind: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    chat_path: str | None = None

    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer; None if there is none."""
        if self.kind is None:
            return None
        return build_tokenizer(self.kind, self.vocab_file, self.merge_file)

    def encoder(self) -> Encoder | None:
        """Return what turns documents into tokens; None if nothing is named."""
        if self.chat_path is not None:
            chat_tokenizer(self.chat_path)  # so that a mistake is told now
            return ChatEncoder(path=self.chat_path)
        tokenizer = self.tokenizer()
        return None if tokenizer is None else PlainEncoder(tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class DomainFiles:
    """A domain that was written.

    Attributes:
        prefix: of the tokens.
        labels: prefix of the labels; None = every token is trained on.
        documents: how many.
        tokens: how many.
        trained: of them trained on.
    """

    prefix: str
    labels: str | None
    documents: int
    tokens: int
    trained: int


def is_tokenised(corpus: DocumentCorpus) -> bool:
    """Tell whether a corpus is made of tokens alone, so that no text has to be encoded again."""
    return all(isinstance(part, TokenPart) for part in corpus.parts)


def copy_tokens(corpus: DocumentCorpus, chosen: Places, prefix: str) -> DomainFiles:
    """Write the chosen documents of tokenised data, and their labels, in their order.

    Raises:
        DataError: the data sets are of different types or tokenizers.
        RunError: the disk is full.
    """
    parts = [part for part in corpus.parts if isinstance(part, TokenPart)]
    sidecars = [part.source.reader.sidecar for part in parts]
    kinds = {part.source.reader.dtype for part in parts}
    made = {None if one is None else str(one.tokenizer.get("sha256")) for one in sidecars}
    if len(kinds) > 1 or len(made) > 1:
        raise DataError(
            "--train: the data sets were not tokenised alike, and cannot become one domain; "
            "choose from each by itself"
        )
    labelled = any(part.source.labels is not None for part in parts)
    with _Datasets(f"{prefix}_token", kinds.pop(), labelled=labelled) as out:
        for place in chosen.tolist():
            for document in corpus.read(place, place + 1):
                assert document.tokens is not None
                out.add(document.tokens, document.labels, len(document.text.encode()))
        first = sidecars[0]
        return out.finish(
            vocab_size=0 if first is None else first.vocab_size,
            eod_id=None if first is None else first.eod_id,
            append_eod=first is not None and first.append_eod,
            tokenizer={} if first is None else dict(first.tokenizer),
        )


def encode_texts(
    path: Path, field: str | None, choice: TokenizerChoice, prefix: str, *, workers: int, say: Say
) -> DomainFiles:
    """Tokenise a file of chosen texts, going on where a killed call stopped.

    Raises:
        NeomixError: see ``preprocess``.
    """
    assert choice.kind is not None
    key = field or TEXT
    tokenizer = build_tokenizer(choice.kind, choice.vocab_file, choice.merge_file)
    settings = PreprocessSettings(
        inputs=(str(path),),
        output_prefix=prefix,
        tokenizer_type=choice.kind,
        vocab_file=choice.vocab_file,
        merge_file=choice.merge_file,
        keys=(key,),
        append_eod=PlainEncoder(tokenizer=tokenizer).eod is not None,
        workers=workers,
    )
    outcome = preprocess(settings, say)
    progress = outcome.journal.keys[key]
    return DomainFiles(
        prefix=dataset_prefix(prefix, key),
        labels=None,
        documents=progress.documents,
        tokens=progress.tokens,
        trained=progress.tokens,
    )


def encode_conversations(
    path: Path, field: str | None, choice: TokenizerChoice, prefix: str, *, workers: int
) -> DomainFiles:
    """Tokenise a file of chosen conversations, and write which tokens are trained on.

    Raises:
        DataError: the chat template refuses one, or none has an answer.
        RunError: the disk is full.
    """
    encoder = choice.encoder()
    if isinstance(encoder, ChatEncoder):
        chat: Any = chat_tokenizer(encoder.path)
        size, end = len(chat), chat.eos_token_id
    else:
        assert isinstance(encoder, PlainEncoder)
        size, end = encoder.tokenizer.vocab_size, encoder.eod
    with _Datasets(f"{prefix}_chat", token_dtype(size), labelled=True) as out:
        for tokens, labels, length in _encoded(path, field, choice, workers):
            out.add(np.asarray(tokens), np.asarray(labels, dtype=np.int32), length)
        if not out.trained:
            raise DataError(
                f"{path}: none of the chosen conversations has an answer (a turn of the role "
                "assistant), so there would be nothing to train on; choose others, or leave the "
                "tokenizer out to keep the records alone"
            )
        return out.finish(
            vocab_size=size,
            eod_id=end,
            append_eod=end is not None,
            tokenizer=dict(encoder.identity()),
        )


class _Datasets:
    """The tokens of a domain and their labels, both there or neither."""

    def __init__(self, prefix: str, dtype: np.dtype[Any], *, labelled: bool) -> None:
        self._prefix = f"{prefix}_document"
        self._labels = f"{prefix}_label_document" if labelled else None
        self._dtype = dtype
        self._stack = ExitStack()
        self._bytes = self._trained = 0

    def __enter__(self) -> _Datasets:
        self._stack.__enter__()
        self._tokens_out = self._stack.enter_context(TokenWriter(self._prefix, self._dtype))
        self._labels_out = (
            None
            if self._labels is None
            else self._stack.enter_context(TokenWriter(self._labels, "int32"))
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def trained(self) -> int:
        """Tokens so far that are trained on."""
        return self._trained

    def add(self, tokens: NDArray[Any], labels: NDArray[np.int32] | None, size: int) -> None:
        if not len(tokens):
            return
        self._tokens_out.add(tokens)
        own = tokens.astype(np.int32) if labels is None else labels
        if self._labels_out is not None:
            self._labels_out.add(own)
        self._bytes += size
        self._trained += int((own >= 0).sum())

    def finish(
        self, *, vocab_size: int, eod_id: int | None, append_eod: bool, tokenizer: dict[str, Any]
    ) -> DomainFiles:
        out = self._tokens_out
        out.close()
        if self._labels_out is not None:
            self._labels_out.close()
        if vocab_size:
            write_sidecar(
                self._prefix,
                Sidecar(
                    documents=out.num_documents,
                    tokens=out.num_tokens,
                    bytes=self._bytes,
                    dtype=out.dtype.name,
                    vocab_size=vocab_size,
                    append_eod=append_eod,
                    eod_id=eod_id,
                    tokenizer=tokenizer,
                    bin=stamp(self._prefix + ".bin"),
                    idx=stamp(self._prefix + ".idx"),
                ),
            )
        return DomainFiles(
            prefix=self._prefix,
            labels=self._labels,
            documents=out.num_documents,
            tokens=out.num_tokens,
            trained=self._trained,
        )


def _encoded(
    path: Path, field: str | None, choice: TokenizerChoice, workers: int
) -> Iterator[tuple[list[int], list[int], int]]:
    encode = _ConversationEncoder(choice, field)
    with path.open("rb") as lines:
        if workers == 1:
            yield from map(encode, lines)
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(encode, lines, chunksize=_CHUNK)


class _ConversationEncoder:
    """Encodes a line of a file of chosen documents; its encoder is made in each process."""

    def __init__(self, choice: TokenizerChoice, field: str | None) -> None:
        self._choice, self._field = choice, field
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_choice": self._choice, "_field": self._field, "_encoder": None}

    def __call__(self, line: bytes) -> tuple[list[int], list[int], int]:
        if self._encoder is None:
            self._encoder = self._choice.encoder()
        assert self._encoder is not None
        record = parse_json(line.decode("utf-8"))
        text, turns = content(record, self._field)
        name = str(record.get(ID))
        document = Document(id=name, source="", number=0, text=text, turns=turns)
        tokens, labels = self._encoder.encode(document)
        return tokens, labels, len(text.encode())
