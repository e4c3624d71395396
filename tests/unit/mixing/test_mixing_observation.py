"""What an observation accepts and refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_sampling_utils import Observation, ObservationError, Signal
from megatron.mixing.window import Window

VECTORS = [
    "loss_sum",
    "token_count",
    "sampling_weights",
    "valid_loss",
    "excess_loss",
    "gradient_alignment",
    "loss_square_sum",
    "sample_count",
]


def test_lists_and_arrays_become_read_only_float64_copies():
    given = np.array([1, 2, 3], dtype=np.int32)
    observation = Observation(step=3, loss_sum=[1.0, 2.0, 3.0], token_count=given)
    given[0] = 9
    assert observation.token_count.tolist() == [1.0, 2.0, 3.0]
    assert observation.token_count.dtype == observation.loss_sum.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        observation.loss_sum[0] = 0.0


def test_everything_after_step_is_keyword_only_and_defaults_to_none():
    observation = Observation(7)
    assert observation.step == 7
    assert all(getattr(observation, name) is None for name in [*VECTORS, "learning_rate"])
    with pytest.raises(TypeError):
        Observation(1, [1.0], [1.0])


@pytest.mark.parametrize("name", ["loss", "losses", "step_", "reward"])
def test_an_unknown_field_is_an_error(name):
    with pytest.raises(TypeError, match=name):
        Observation(1, **{name: [1.0]})


def pair(name, value):
    """The field with its fellow, where it must have one."""
    fellow = {"loss_sum": "token_count", "token_count": "loss_sum"}.get(name)
    return {name: value} | ({fellow: [1.0, 1.0]} if fellow else {})


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize(
    "value",
    [[], [[0.5], [0.5]], 0.5, "ab", ["0.5", "0.5"], [None, 0.5], [True, False], [[0.5], 0.5], {}],
)
def test_what_is_no_vector_is_refused(name, value):
    with pytest.raises(ObservationError, match=f"step 4: {name}"):
        Observation(4, **pair(name, value))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_different_length_are_refused(name):
    other = {"valid_loss": [1.0, 2.0, 3.0]} if name != "valid_loss" else {"excess_loss": [1.0] * 3}
    with pytest.raises(ObservationError, match="differ in length"):
        Observation(4, **pair(name, [0.5, 0.5]), **other)


@pytest.mark.parametrize("name", ["token_count", "sample_count"])
@pytest.mark.parametrize("bad", [-1, -1e-9, math.nan, math.inf])
def test_counts_are_finite_and_not_negative(name, bad):
    with pytest.raises(ObservationError, match=f"{name}.*counts are finite and at least 0"):
        Observation(1, **pair(name, [1.0, bad]))


@pytest.mark.parametrize("name", ["loss_sum", "token_count"])
def test_losses_and_counts_come_together(name):
    with pytest.raises(ObservationError, match="give both"):
        Observation(1, **{name: [1.0]})


@pytest.mark.parametrize("bad", [[0.5, 0.4], [1.2, -0.2], [math.nan, 1.0], [math.inf, 0.0]])
def test_sampling_weights_are_a_distribution(bad):
    with pytest.raises(ObservationError, match="must be the distribution"):
        Observation(1, sampling_weights=bad)
    Observation(1, sampling_weights=np.full(22, 1 / 22, dtype=np.float32))


@pytest.mark.parametrize("step", [-1, 0.5, 1.0, "1", None, True, math.nan])
def test_what_is_no_step_is_refused(step):
    with pytest.raises(ObservationError, match="step is"):
        Observation(step)


def test_numpy_steps_are_steps():
    assert type(Observation(np.int64(3)).step) is int


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, "1e-3", [1e-3], True])
def test_a_bad_learning_rate_is_refused(rate):
    with pytest.raises(ObservationError, match="learning_rate"):
        Observation(1, learning_rate=rate)
    assert Observation(1, learning_rate=np.float32(0.5)).learning_rate == 0.5


def test_finite_looks_at_the_loss_and_at_what_is_needed():
    loss = Signal.LOSS
    fine = {"loss_sum": [1.0, 1.0], "token_count": [1, 1]}
    assert not Observation(1, loss_sum=[math.nan, 1.0], token_count=[0, 1]).finite(frozenset())
    infinite = Observation(1, **fine, valid_loss=[math.inf, 1.0])
    assert infinite.finite(frozenset({loss}))
    assert not infinite.finite(frozenset({Signal.VALID_LOSS}))
    unmeasured = Observation(1, **fine, valid_loss=[math.nan, 1.0], excess_loss=[1.0, math.nan])
    assert unmeasured.finite(frozenset({Signal.VALID_LOSS, Signal.EXCESS_LOSS}))
    alignment = Observation(1, **fine, gradient_alignment=[math.nan, 1.0])
    assert not alignment.finite(frozenset({Signal.GRADIENT_ALIGNMENT}))


def test_a_validation_reports_no_tokens():
    assert Observation(0, valid_loss=[1.0]).only_validation
    assert Observation(0, valid_loss=[1.0], loss_sum=[0.0], token_count=[0]).only_validation
    assert not Observation(1, valid_loss=[1.0], loss_sum=[1.0], token_count=[1]).only_validation
    assert not Observation(1, loss_sum=[0.0], token_count=[0]).only_validation


def window_of(*observations):
    window = Window.empty(2)
    for observation in observations:
        window = window.add(observation, np.array([0.5, 0.5]))
    return window


def test_a_window_adds_sums_and_averages_the_rest():
    window = window_of(
        Observation(
            1,
            loss_sum=[2.0, 9.0],
            token_count=[2, 0],
            excess_loss=[0.5, math.nan],
            gradient_alignment=[1.0, 0.0],
            valid_loss=[3.0, math.nan],
            loss_square_sum=[4.0, 0.0],
            sample_count=[1, 0],
            learning_rate=0.1,
        ),
        Observation(
            2,
            loss_sum=[4.0, 3.0],
            token_count=[6, 1],
            excess_loss=[0.1, 0.2],
            gradient_alignment=[0.0, 1.0],
            valid_loss=[math.nan, 5.0],
            loss_square_sum=[1.0, 9.0],
            sample_count=[3, 1],
            learning_rate=0.3,
        ),
    )
    assert window.steps == 2
    assert window.mean_loss.tolist() == [0.75, 3.0]
    np.testing.assert_allclose(window.mean_excess, [(0.5 * 2 + 0.1 * 6) / 8, 0.2])
    assert window.gradient_alignment.tolist() == [0.5, 0.5]
    assert window.valid_loss.tolist() == [3.0, 5.0]
    assert window.loss_square_sum.tolist() == [5.0, 9.0]
    assert window.sample_count.tolist() == [4.0, 1.0]
    assert window.learning_rate == pytest.approx(0.2)


def test_equal_sampling_weights_pool_to_their_own_bits():
    window, weights = Window.empty(3), np.array([0.1, 0.3, 0.6])
    for step in range(1, 50):
        one = Observation(step, loss_sum=[1.0] * 3, token_count=[1] * 3)
        window = window.add(one, weights)
    assert window.sampling_weights.tobytes() == weights.tobytes()


def test_a_domain_that_never_came_has_no_excess():
    window = window_of(Observation(1, loss_sum=[1.0, 0.0], token_count=[1, 0]))
    assert np.isnan(window.mean_excess).all()
    assert window.present.tolist() == [True, False]
    assert window.mean_loss.tolist() == [1.0, 0.0]
