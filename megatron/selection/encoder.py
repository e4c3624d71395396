"""What turns texts into vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say

TextOf = Callable[[Document], str]


class Encoder(Protocol):
    """A way of embedding texts; ``prepare`` and ``open`` are those of a selector."""

    def parameters(self) -> Mapping[str, Any]:
        """Return, JSON-able, all that decides the vectors beside the corpus."""
        ...

    def prepare(self, corpus: Corpus, text_of: TextOf, folder: Path, say: Say) -> None:
        """Make, once, what ``open`` reads."""
        ...

    def open(self, folder: Path) -> None:
        """Get ready for ``encode``."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[FloatArray, Cost]:
        """Return [texts, dimensions] vectors of any length, and what they cost."""
        ...
