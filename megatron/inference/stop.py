"""Texts that end a continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MARGIN = 8


class StopStrings:
    """Looks for texts at the end of what has been generated.

    Args:
        texts: what ends a continuation; empty ones do not count.
        decode: returns the text of token ids.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        """Keep the texts."""
        self._texts = [text for text in texts if text]
        self._decode = decode
        # A token that holds a part of a text holds at least one byte of it.
        self._tokens = max((len(text.encode()) for text in self._texts), default=0) + _MARGIN

    def ended(self, tokens: Sequence[int]) -> bool:
        """Tell whether the newest token completes one of the texts."""
        if not self._texts:
            return False
        tail = self._decode(tokens[-self._tokens :])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """Return ``text`` up to the first of the texts."""
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text
