"""Small domains made of numbers, so that the examples need no download.

Every domain is a set of windows of token ids.  The domains are learned at different speeds,
which is what makes a mixture worth deciding:

* ``cycle`` repeats a short pattern: learned in a few steps, then there is nothing left.
* ``walk`` moves up or down by one: half a bit a token cannot be known.
* ``sum`` continues with the sum of the last two, in a domain of its own numbers: slow.
* ``noise`` is uniform: nothing can be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from data_sampling_utils import count_loss

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

VOCABULARY = 48
NAMES = ("cycle", "walk", "sum", "noise")


def make_domains(*, windows: int, length: int, seed: int) -> dict[str, IntArray]:
    """Return ``windows`` windows of ``length`` tokens by domain, each int64 [windows, length]."""
    random = np.random.default_rng(seed)
    makers = {"cycle": _cycle, "walk": _walk, "sum": _sum, "noise": _noise}
    return {name: makers[name](random, windows, length) for name in NAMES}


def split(
    domains: Mapping[str, IntArray], held_out: int
) -> tuple[dict[str, IntArray], dict[str, IntArray]]:
    """Return the windows to train on, and the last ``held_out`` of each domain apart from them."""
    train = {name: windows[:-held_out] for name, windows in domains.items()}
    return train, {name: windows[-held_out:] for name, windows in domains.items()}


def counter(train: Mapping[str, IntArray]) -> Callable[[FloatArray], FloatArray]:
    """Return what tells a controller, when it asks, what counts can predict of each domain.

    ``auto`` is the method that asks: with the tokens to count of each domain, once.
    """

    def count(tokens: FloatArray) -> FloatArray:
        losses = []
        for windows, wanted in zip(train.values(), tokens, strict=True):
            some = windows[: max(2, int(wanted) // windows.shape[1])]
            losses.append(count_loss(some, VOCABULARY).loss)
        return np.array(losses)

    return count


def _cycle(random: np.random.Generator, windows: int, length: int) -> IntArray:
    pattern = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    place = random.integers(0, len(pattern), (windows, 1)) + np.arange(length)
    return pattern[place % len(pattern)]


def _walk(random: np.random.Generator, windows: int, length: int) -> IntArray:
    steps = random.choice([-1, 1], (windows, length))
    return (random.integers(0, 16, (windows, 1)) + steps.cumsum(axis=1)) % 16


def _sum(random: np.random.Generator, windows: int, length: int) -> IntArray:
    tokens = random.integers(0, 7, (windows, length))
    for place in range(2, length):
        tokens[:, place] = (tokens[:, place - 1] + tokens[:, place - 2]) % 7
    return tokens + 16


def _noise(random: np.random.Generator, windows: int, length: int) -> IntArray:
    return random.integers(24, VOCABULARY, (windows, length))
