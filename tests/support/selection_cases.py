"""Small corpora and targets for the tests of selectors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.selection.base import Document, Target, Turn


class ListedCorpus:
    """Documents of a list."""

    def __init__(self, texts: Sequence[str | Document]) -> None:
        self.documents = [document(one, at) for at, one in enumerate(texts)]
        self.read_from: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        self.read_from.append(start)
        yield from self.documents[start:stop]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.documents).encode()).hexdigest()


def document(text: str | Document, number: int = 0) -> Document:
    """Return a plain document of a text."""
    if isinstance(text, Document):
        return text
    return Document(id=f"corpus:{number}", source="corpus", number=number, text=text)


def chat(*contents: str, number: int = 0) -> Document:
    """Return a chat whose roles take turns."""
    turns = tuple(
        Turn(role=("user", "assistant")[at % 2], content=one) for at, one in enumerate(contents)
    )
    return Document(
        id=f"chat:{number}", source="chat", number=number, text="\n".join(contents), turns=turns
    )


def target(name: str, *texts: str) -> Target:
    """Return a subtask of plain examples."""
    return Target(name=name, documents=tuple(document(one, at) for at, one in enumerate(texts)))


def mixed_corpus(
    seed: int, documents: int = 500, share: float = 0.2, strength: float = 6.0
) -> tuple[list[str], NDArray[np.bool_], list[str]]:
    """Return texts of which a share is from the target's distribution, which, and examples of it.

    Both distributions have the same words, half of them with other probabilities: what tells
    them apart is how often words stand together, not words that only one of them has.

    Args:
        seed: of the texts.
        documents: in all.
        share: of them that is from the target's distribution.
        strength: factor between the two probabilities of the words that differ.
    """
    rng = np.random.default_rng(seed)
    common = 1 / np.arange(10, 410)
    theirs, ours = common.copy(), common.copy()
    ours[100:200] *= strength
    theirs[200:300] *= strength

    def draw(weights: NDArray[np.float64]) -> str:
        picked = rng.choice(len(weights), size=rng.integers(20, 60), p=weights / weights.sum())
        return " ".join(f"w{one}" for one in picked)

    is_target = np.zeros(documents, dtype=bool)
    is_target[rng.choice(documents, size=round(share * documents), replace=False)] = True
    texts = [draw(ours if one else theirs) for one in is_target]
    return texts, is_target, [draw(ours) for _ in range(20)]


def precision(scores: NDArray[np.float64], is_target: NDArray[np.bool_]) -> float:
    """Return which part of as many best documents as there are of the target's is of them."""
    best = np.argsort(-scores, kind="stable")[: is_target.sum()]
    return float(is_target[best].mean())
