"""How many tokens training reads of a document, and which of them it is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.ingest.chat import ChatSettings, build_chat
from megatron.data.samples import UNTRAINED
from megatron.errors import DataError
from megatron.selection.base import ANSWERING, Document, Turn
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import chat_tokenizer

Counts = NDArray[np.int64]


class Encoder(Protocol):
    """Documents to what training reads."""

    def identity(self) -> Mapping[str, Any]:
        """Return, JSON-able, what decides the tokens."""
        ...

    def count(self, documents: Sequence[Document]) -> Counts:
        """Return how many tokens each document is; 0 of one without any."""
        ...

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Return a document's tokens and as many labels, -100 where it is not trained on.

        Raises:
            DataError: the chat template refuses it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PlainEncoder:
    """Texts by a tokenizer, each ended by the end-of-document token if there is one.

    Of a conversation, the turns follow each other with a newline between, and what the assistant
    says is trained on.
    """

    tokenizer: Tokenizer

    def identity(self) -> Mapping[str, Any]:
        """Return the tokenizer's name and hash."""
        return {"type": self.tokenizer.name, "sha256": self.tokenizer.sha256}

    def count(self, documents: Sequence[Document]) -> Counts:
        """Return how many tokens each document is; 0 of an empty one."""
        plain = [n for n, one in enumerate(documents) if one.tokens is None and not one.turns]
        found = np.zeros(len(documents), dtype=np.int64)
        encoded = self.tokenizer.encode_batch([documents[n].text for n in plain])
        end = 0 if self.eod is None else 1
        for n, ids in zip(plain, encoded, strict=True):
            found[n] = len(ids) + end if len(ids) else 0
        for n, document in enumerate(documents):
            if document.tokens is not None:
                found[n] = len(document.tokens)
            elif document.turns:
                found[n] = len(self.encode(document)[0])
        return found

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Return a document's tokens and as many labels, -100 where it is not trained on."""
        turns = document.turns or (Turn(role=ANSWERING, content=document.text),)
        tokens: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            ids = self.tokenizer.encode(turn.content if last else turn.content + "\n")
            ids = [*ids, self.eod] if last and self.eod is not None and (ids or tokens) else ids
            tokens.extend(ids)
            labels.extend(ids if turn.role == ANSWERING else [UNTRAINED] * len(ids))
        return tokens, labels

    @property
    def eod(self) -> int | None:
        """Id that ends a document; None if the vocabulary has none."""
        try:
            return self.tokenizer.eod
        except DataError:
            return None


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Conversations by a tokenizer's own chat template; a plain text is one answer's words.

    Attributes:
        path: folder of a Hugging Face tokenizer with a chat template.
    """

    path: str

    def identity(self) -> Mapping[str, Any]:
        """Return the tokenizer's and template's hash."""
        return {"type": "chat_template", "sha256": chat_sha256(self.path)}

    def count(self, documents: Sequence[Document]) -> Counts:
        """Return how many tokens each document is."""
        return np.array([len(self.encode(one)[0]) for one in documents], dtype=np.int64)

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Return a document's tokens and as many labels, -100 where it is not trained on.

        Raises:
            DataError: the chat template refuses it.
        """
        if document.tokens is not None:
            ids = [int(token) for token in document.tokens]
            return ids, list(ids)
        tokenizer = chat_tokenizer(self.path)
        if not document.turns:
            ids = list(tokenizer.encode(document.text, add_special_tokens=False))
            end = tokenizer.eos_token_id
            ids = [*ids, int(end)] if end is not None and ids else ids
            return ids, list(ids)
        turns = [{"role": turn.role, "content": turn.content} for turn in document.turns]
        try:
            return build_chat(turns, tokenizer, ChatSettings(tokenizer_path=self.path))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"document {document.id}: {error}") from None
        except Exception as error:  # templates raise what jinja's classes are
            raise DataError(
                f"document {document.id}: the chat template refuses it: {error}"
            ) from None


def chat_sha256(path: str) -> str:
    """Return the hash (hex) of a chat tokenizer: its vocabulary and its template."""
    tokenizer = chat_tokenizer(path)
    described = f"{tokenizer.chat_template}{sorted(tokenizer.get_vocab().items())}"
    return hashlib.sha256(described.encode()).hexdigest()


def count_words(documents: Sequence[Document]) -> Counts:
    """Return how many words, between white space, each document's text has."""
    return np.array([len(one.text.split()) for one in documents], dtype=np.int64)
