"""What a gradient is taken of: a document's tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron.checkpoint.files import replacing
from megatron.data.ingest.chat import ChatSettings, build_chat
from megatron.data.samples import UNTRAINED
from megatron.selection.base import Document
from megatron.selection.language_model import check_known

Ids = NDArray[np.int32]

TULU_TEMPLATE: Final = (
    "{% for turn in messages %}{{ '<|' + turn['role'] + '|>\\n' + turn['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Tulu's form of a conversation, as in LESS, for tokenizers without a template of their own."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Tokens and, at each one's own place, what is learned.

    Attributes:
        tokens: [n] ids.
        labels: [n] the same where a token is learned, else -100.
    """

    tokens: Ids
    labels: Ids

    @property
    def learned(self) -> int:
        """How many tokens are predicted and learned; the first is predicted by nothing."""
        return int((self.labels[1:] != UNTRAINED).sum())


class ExampleMaker:
    """Turns documents into examples.

    Text is learned whole, tokens of the model's own tokenizer where their labels say so.  Of a
    conversation the assistant's turns are learned, written by the tokenizer's chat template or, if
    it has none, in Tulu's form.  What is beyond ``longest``
    tokens is cut off.
    """

    def __init__(
        self, tokenizer: Any, *, identity: str | None, longest: int, vocab_size: int
    ) -> None:
        """Take a tokenizer of transformers.

        Args:
            tokenizer: of the model.
            identity: SHA-256 (hex) of its file, which a document's tokens may bear.
            longest: tokens of an example.
            vocab_size: token ids that the model knows.
        """
        if tokenizer.chat_template is None:
            tokenizer.chat_template = TULU_TEMPLATE
        self._tokenizer, self._identity, self._longest = tokenizer, identity, longest
        self._vocab_size = vocab_size
        self._settings = ChatSettings(tokenizer_path="")

    def make(self, document: Document) -> Example | None:
        """Return a document's example; None where there is nothing to learn.

        That is so of empty texts, of conversations without an answer within ``longest`` tokens,
        and of those that the chat template refuses or writes in a way in which no token can be
        said to be an answer's.

        Raises:
            DataError: the model does not know one of its tokens.
        """
        pair = self._conversation(document) if document.turns else self._plain(document)
        if pair is None:
            return None
        tokens, labels = (np.asarray(part[: self._longest], dtype=np.int32) for part in pair)
        check_known(tokens, self._vocab_size, document)
        example = Example(tokens=tokens, labels=labels)
        return example if example.learned else None

    def _plain(self, document: Document) -> tuple[Any, Any]:
        own = document.tokens
        if own is not None and self._identity is not None and document.tokenizer == self._identity:
            return own, own if document.labels is None else document.labels
        tokens = self._tokenizer(document.text, truncation=False, verbose=False)["input_ids"]
        return tokens, tokens

    def _conversation(self, document: Document) -> tuple[list[int], list[int]] | None:
        turns: list[Mapping[str, Any]] = [
            {"role": turn.role, "content": turn.content} for turn in document.turns
        ]
        try:
            return build_chat(turns, self._tokenizer, self._settings)
        except Exception:  # templates raise what jinja's classes are
            return None


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write examples into one file, atomically; one of them is in memory at a time."""
    sizes = []
    with replacing(path) as out:
        for example in examples:
            out.write(np.stack([example.tokens, example.labels]).astype("<i4").tobytes())
            sizes.append(len(example.tokens))
        out.write(np.array([*sizes, len(sizes)], dtype="<i8").tobytes())


class ExampleFile:
    """Examples that :func:`write_examples` wrote, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self._content = np.memmap(path, dtype="<i4", mode="r")
        count = int(self._content[-2:].view("<i8")[0])
        self.sizes: NDArray[np.int64] = self._content[-2 * (count + 1) : -2].view("<i8")
        self._starts = np.concatenate([[0], np.cumsum(2 * self.sizes)])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.sizes)

    def __getitem__(self, number: int) -> Example:
        """Return one of them."""
        both = np.array(self._content[self._starts[number] : self._starts[number + 1]])
        tokens, labels = both.reshape(2, -1)
        return Example(tokens=tokens, labels=labels)
