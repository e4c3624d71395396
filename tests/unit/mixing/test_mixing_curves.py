"""Two curves that tell the paper's rule from the rule its released code trains with.

K = 22, losses evenly spaced from 0.9 to 3.2, every domain seen at every step: how far
apart do the weights drift?  The curves are computed a second time here, by plain
Python that shares nothing with the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer

K = 22
LOSSES = [0.9 + 2.3 * i / (K - 1) for i in range(K)]
PINNED = {
    "odm": {1_000: 1.38, 10_000: 1.16, 100_000: 1.06},
    "smoothed_mean": {1_000: 4.7, 10_000: 7.6, 100_000: 9.1},
}
DIGITS = {"odm": 2, "smoothed_mean": 1}


def rate(step: int) -> float:
    return min(1 / K, math.sqrt(math.log(K) / (K * step))) if step else 1 / K


def plain(method: str, steps: int) -> Iterator[list[float]]:
    p, estimate = [1 / K] * K, [0.0] * K
    for step in range(1, steps + 1):
        before, now = rate(step - 1), rate(step)
        if method == "odm":
            estimate = [0.9 * r + 0.1 * x / q for r, x, q in zip(estimate, LOSSES, p, strict=True)]
            raw = [math.exp(before * r) for r in estimate]
        else:
            estimate = [0.9 * r + 0.1 * math.exp(x) for r, x in zip(estimate, LOSSES, strict=True)]
            raw = estimate
        total = sum(raw)
        p = [(1 - K * now) * r / total + now for r in raw]
        yield p


def check(method: str, step: int, p: np.ndarray) -> None:
    assert round(float(p.max() / p.min()), DIGITS[method]) == PINNED[method][step]


def run(method: str, steps: int) -> None:
    """Walk both along the curve and compare them wherever it is pinned."""
    mixer = build_mixer(method, domains=[f"d{i}" for i in range(K)], smoothing_factor=0.9)
    for step, expected in enumerate(plain(method, steps), start=1):
        mixer.observe(Observation(step, loss_sum=LOSSES, token_count=[1.0] * K))
        if step in PINNED[method]:
            p = mixer.decide(step + 1).sampling_weights
            check(method, step, p)
            np.testing.assert_allclose(p, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", PINNED)
def test_the_start_of_the_curve(method):
    run(method, 1_000)


@pytest.mark.slow
@pytest.mark.parametrize("method", PINNED)
def test_the_whole_curve(method):
    run(method, 100_000)


@pytest.mark.parametrize("method", PINNED)
@pytest.mark.parametrize("steps", [10_000, 100_000])
def test_late_on_the_curve(method, steps):
    """Both settle on their fixed point within hundreds of steps, so the last ones are enough."""
    mixer = build_mixer(method, domains=[f"d{i}" for i in range(K)], smoothing_factor=0.9)
    for step in range(steps - 999, steps + 1):
        mixer.observe(Observation(step, loss_sum=LOSSES, token_count=[1.0] * K))
    check(method, steps, mixer.decide(steps + 1).sampling_weights)
