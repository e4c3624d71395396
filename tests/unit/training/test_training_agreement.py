"""Ranks whose mixing state has come apart are found, and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron.training.agreement import Agreement, DesyncError

SAME = {"sampler": {"cursors": [1, 2]}, "mixer": {"weights": [0.5, 0.5]}}
OTHER = {"sampler": {"cursors": [1, 2]}, "mixer": {"weights": [0.5, 0.5000000000000001]}}
THIRD = {"sampler": {"cursors": [1, 3]}, "mixer": {"weights": [0.5, 0.5]}}


def compare(states: list[Mapping[str, Any]], *, step: int = 40) -> None:
    """Compare as every rank would: all must come to the same end."""
    hashes: list[str] = []
    for state in states:
        Agreement(
            gather=lambda own: hashes.append(own) or [own],  # type: ignore[func-returns-value]
            state=lambda state=state: state,  # type: ignore[misc]
            interval=1,
        ).compare(step)
    Agreement(gather=lambda own: hashes, state=lambda: states[0], interval=1).compare(step)


def test_equal_states_agree() -> None:
    compare([SAME, dict(reversed(SAME.items())), SAME])


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([SAME, SAME, OTHER, SAME], "after step 40 .*: rank 2 differs from the rest"),
        ([OTHER, SAME, SAME, SAME, THIRD], "ranks 0, 4 differ from the rest"),
        ([SAME, OTHER], "no state has a majority .rank 0: [0-9a-f]{16}; rank 1: [0-9a-f]{16}"),
        ([SAME] * 20 + [OTHER] * 10, "ranks 20, 21, 22, 23, 24, 25, 26, 27 and 2 more differ"),
    ],
)
def test_a_difference_of_one_bit_names_the_ranks(
    states: list[Mapping[str, Any]], said: str
) -> None:
    with pytest.raises(DesyncError, match=said) as error:
        compare(states)
    assert error.value.exit_code == 1


def test_comparisons_are_made_when_they_are_due() -> None:
    made: list[str] = []

    def gather(own: str) -> list[str]:
        made.append(own)
        return [own]

    def agreement(interval: int) -> Agreement:
        return Agreement(gather=gather, state=lambda: SAME, interval=interval)

    for step in range(1, 11):
        agreement(3).after_step(step)
        agreement(0).after_step(step)
    assert len(made) == 3
    agreement(0).compare(10)
    assert len(made) == 4
