"""The words of a document, prepared as the released selection code prepares them.

Lower case, newline to space, ASCII punctuation taken out, split at single spaces (Yin and Rush
2024, Compute-Constrained Data Selection, arXiv 2410.16208, the released code).  Two spaces in a
row so leave an empty word, which counts as a word like any other, there and here.
"""

from __future__ import annotations

import argparse
import string
from typing import Final

from megatron.errors import ConfigError, DataError
from megatron.selection.base import Document, Target

FIELDS: Final = ("first", "all")
"""What of a chat is read: its first message (released), or all of its messages."""

EXAMPLES: Final = ("joined", "mean")
"""What a subtask's examples make together: one long text (released), or the mean over them."""

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def prepare(text: str) -> str:
    """Return a text in lower case, in one line, without ASCII punctuation."""
    return text.lower().replace("\n", " ").translate(_PUNCTUATION)


def words(text: str) -> list[str]:
    """Return the words of a text, empty ones among them; of an empty text one empty word."""
    return prepare(text).split(" ")


def has_word(found: list[str]) -> bool:
    """Return whether any of the words is more than white space."""
    return any(map(str.strip, found))


def field_text(document: Document, field: str) -> str:
    """Return what a selector reads of a document.

    Args:
        document: of a corpus.  A plain text, and one of a tokenised domain, is read whole.
        field: one of :data:`FIELDS`.
    """
    if field == "first" and document.turns:
        return document.turns[0].content
    return document.text


def example_texts(target: Target) -> list[str]:
    """Return the texts of a subtask's examples, answers included, without the empty ones.

    Targets are always read whole: what an answer is about says as much as the question.

    Raises:
        DataError: no example has a word.
    """
    texts = [one.text for one in target.documents]
    kept = [text for text in texts if has_word(words(text))]
    if not kept:
        raise DataError(
            f"target {target.name!r}: none of its {len(texts)} examples has a word; give it texts "
            "or leave it out"
        )
    return kept


def add_text_arguments(parser: argparse.ArgumentParser, *, examples: str) -> None:
    """Add the flags that ``bm25`` and ``embed`` share.

    Args:
        parser: of the command.
        examples: the default of ``--examples``.
    """
    parser.add_argument("--messages", choices=FIELDS, default="first",
        help="of a chat: score its first message, or all of them (default: first); targets are "
        "read whole")  # fmt: skip
    parser.add_argument("--examples", choices=EXAMPLES, default=examples,
        help="a subtask's examples together: joined to one text, or the mean of their scores "
        f"(default: {examples})")  # fmt: skip
    parser.add_argument("--aggregate", choices=("mean", "max"), default="mean",
        help="over the subtasks (default: mean)")  # fmt: skip


def check_choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless a value is among those known."""
    if value not in known:
        raise ConfigError(f"{flag} {value!r}: choose from {', '.join(known)}")
