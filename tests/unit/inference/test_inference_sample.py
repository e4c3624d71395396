"""Draws of the next token: what may be drawn, how often, and that a draw can be repeated."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.inference.sample import Sampling

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))


def draws(sampling: Sampling, count: int = 2000) -> np.ndarray:
    return np.array([sampling.draw(LOGITS, row=0, position=n) for n in range(count)])


def test_without_temperature_the_most_probable_token_is_drawn() -> None:
    assert set(draws(Sampling(), 5)) == {1}


def test_frequencies_are_the_probabilities() -> None:
    found = draws(Sampling(temperature=1.0))
    for token, probability in enumerate(np.exp(LOGITS.astype(float))):
        spread = np.sqrt(probability * (1 - probability) / found.size)
        assert abs((found == token).mean() - probability) < 5 * spread


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.9}, {1, 2, 3}),
        ({"top_p": 0.9, "top_k": 2}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
    ],
)
def test_bounds_leave_the_most_probable_tokens(options: dict, possible: set[int]) -> None:
    assert set(draws(Sampling(temperature=1.0, **options), 400)) == possible


def test_a_draw_depends_on_seed_row_and_position_alone() -> None:
    def drawn(seed: int, row: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [sampling.draw(LOGITS, row=row, position=n) for n in range(50)]

    assert drawn(1, 0) == drawn(1, 0)
    assert drawn(1, 0) != drawn(2, 0)
    assert drawn(1, 0) != drawn(1, 1)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.5}, {"top_p": float("nan")}]
)
def test_values_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        Sampling(**options)
