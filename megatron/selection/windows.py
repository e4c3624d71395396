"""Overlapping windows over a document that is longer than a model reads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron.errors import ConfigError


class Window(NamedTuple):
    """Tokens [start, stop) of a document, of which those from ``first`` on are predicted."""

    start: int
    stop: int
    first: int

    @property
    def read(self) -> int:
        """Tokens that the model reads: the last is only predicted."""
        return self.stop - self.start - 1

    @property
    def predicted(self) -> int:
        """Tokens whose loss counts."""
        return self.stop - self.first


def windows(length: int, *, size: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a document; every token but the first is predicted exactly once.

    A window begins ``stride`` tokens after the one before and predicts what that one did not, so
    that every token beyond the first window has at least ``size - stride`` tokens before it, as
    in Hugging Face's guide to the perplexity of fixed-length models.

    Args:
        length: of the document in tokens.
        size: largest window.
        stride: between two windows' beginnings.
    """
    if length < 2:
        return
    done = 1
    for start in range(0, length, stride):
        stop = min(start + size, length)
        yield Window(start, stop, done)
        done = stop
        if stop == length:
            return


def fitted(size: int, stride: int, longest: int | None) -> tuple[int, int]:
    """Return window and stride for a model that reads no more than ``longest`` tokens.

    Where the window shrinks, the stride shrinks in proportion.

    Raises:
        ConfigError: the stride is above the window, so that tokens would go unread; or one of
            them is too small.
    """
    if size < 2:
        raise ConfigError(f"--window {size}: a window has at least 2 tokens")
    if not 1 <= stride <= size - 1:
        raise ConfigError(
            f"--stride {stride}: must be from 1 to {size - 1}, below --window, so that every token "
            "is predicted from at least one other"
        )
    if longest is None or longest >= size:
        return size, stride
    return longest, max(1, min(longest - 1, stride * longest // size))
