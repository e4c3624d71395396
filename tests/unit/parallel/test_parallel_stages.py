"""Dealing layers out to stages: exact against every possible cut, and sensible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.parallel.stages import layer_weights, stage_bounds

NAMES = ["Embedding", *["TransformerBlock"] * 4, "FinalNorm", "Embedding"]
PARAMETERS = [800, 100, 100, 100, 100, 2, 800]


def parts(weights: list[float], bounds: list[int]) -> list[float]:
    return [sum(weights[low:high]) for low, high in itertools.pairwise(bounds)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data())
def test_no_other_cut_has_a_lighter_heaviest_part(data: st.DataObject) -> None:
    # Quarters add up exactly, so that the brute force below compares exact sums.
    weights = [
        value / 4 for value in data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    ]
    counting = sum(weight > 0 for weight in weights)
    stages = data.draw(st.integers(1, max(1, counting)))
    bounds = stage_bounds(weights, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    assert all(low < high for low, high in itertools.pairwise(bounds))

    def cost(cut: list[int]) -> tuple[float, float]:
        sums = parts(weights, cut)
        return max(sums), sum(value**2 for value in sums)

    cuts = itertools.combinations(range(1, len(weights)), stages - 1)
    assert cost(bounds) == min(cost([0, *cut, len(weights)]) for cut in cuts)
    if counting >= stages:
        assert stages == 1 or min(parts(weights, bounds)) > 0
    assert stage_bounds(weights, stages) == bounds


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 96), st.data())
def test_equal_layers_are_dealt_out_evenly(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    sizes = parts([1.0] * layers, stage_bounds([1.0] * layers, stages))
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == min(sizes) or layers % stages > stages - 2


@pytest.mark.parametrize("blocks", [64, 65, 96, 128])
def test_many_layers_and_stages(blocks: int) -> None:
    weights = [0.0, *[1.0] * blocks, 0.0, 0.0]
    bounds = stage_bounds(weights, 64)
    assert max(parts(weights, bounds)) == -(-blocks // 64)
    assert len(bounds) == 65


@pytest.mark.parametrize(
    ("method", "stages", "expected"),
    [
        # The first stage also gets the embedding, the last the norm and the output.
        ("type:transformer", 2, [0, 3, 7]),
        ("type:TRANSFORMER", 4, [0, 2, 3, 4, 7]),
        ("type:block$", 3, [0, 2, 4, 7]),
        ("type:embedding", 2, [0, 4, 7]),
        ("uniform", 2, [0, 4, 7]),
        ("uniform", 7, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("parameters", 2, [0, 3, 7]),
        ("parameters", 3, [0, 1, 6, 7]),
        ("parameters", 1, [0, 7]),
    ],
)
def test_methods(method: str, stages: int, expected: list[int]) -> None:
    weights = layer_weights(method, names=NAMES, parameters=PARAMETERS)
    assert stage_bounds(weights, stages) == expected


def test_the_stages_with_embedding_and_output_get_fewer_blocks() -> None:
    weights = layer_weights(
        "type:transformer",
        names=["Embedding", *["TransformerBlock"] * 14, "FinalNorm", "OutputLayer"],
        parameters=[1] * 17,
    )
    assert parts(weights, stage_bounds(weights, 4)) == [3, 4, 4, 3]


def test_sums_that_floats_cannot_hold_are_compared_exactly() -> None:
    # In float64 2**60 + 1 is 2**60, and the two cuts would look the same.
    assert stage_bounds([2.0**60, 1.0, 2.0**60 - 2048.0], 2) == [0, 1, 3]
    assert stage_bounds([2.0**60 - 2048.0, 1.0, 2.0**60], 2) == [0, 2, 3]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("type:resnet", "no layer's class matches; the classes are Embedding, TransformerBlock"),
        ("type:(", "no regular expression"),
        ("type:", "it can be uniform"),
        ("best", "it can be uniform"),
        ("uniform:3", "it can be uniform"),
    ],
)
def test_methods_that_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_weights(method, names=NAMES, parameters=PARAMETERS)


def test_more_stages_than_layers_that_count_are_refused() -> None:
    weights = layer_weights("type:transformer", names=NAMES, parameters=PARAMETERS)
    with pytest.raises(ConfigError, match=r"pipe_parallel_size is 5.*counts only 4 of the model"):
        stage_bounds(weights, 5)
    with pytest.raises(ConfigError, match="use at most 7 stages"):
        stage_bounds([1.0] * 7, 8)


@pytest.mark.parametrize("weights", [[], [1.0, -1.0], [1.0, float("inf")], [float("nan")]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot cut"):
        stage_bounds(weights, 1)
