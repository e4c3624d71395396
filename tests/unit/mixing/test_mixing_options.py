"""Options: what is accepted, and how a mistake is named."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_type_hints

import numpy as np
import pytest

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.errors import ConfigError
from megatron.mixing.options import CommonOptions, fits
from megatron.registry import mixing_methods

COMMON = {
    "floor",
    "ceiling",
    "warmup_steps",
    "update_every",
    "pool",
    "min_tokens",
    "shadow",
    "objective",
    "max_epochs",
}


def build(method="odm", domains=("code", "prose"), **arguments):
    return build_mixer(method, domains=list(domains), **arguments)


def test_the_first_set_of_methods():
    assert {
        "static",
        "schedule",
        "odm",
        "smoothed_mean",
        "smoothed_mean_exp",
        "exp3",
        "ema",
    } <= set(available_methods())
    assert available_methods() == sorted(available_methods())


@pytest.mark.parametrize("method", available_methods())
def test_options_are_a_frozen_keyword_only_dataclass_with_help(method):
    options = mixing_methods[method].options
    assert issubclass(options, CommonOptions)
    assert options.__dataclass_params__.frozen
    assert {field.name for field in dataclasses.fields(options)} >= COMMON
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        assert field.kw_only
        assert field.metadata["help"]
        assert field.default is not dataclasses.MISSING
        assert fits(field.default, hints[field.name])
    options()


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown mixing method 'odn'; did you mean 'odm'\?"):
        build("odn")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'odm' has no option 'smoothing_facto'; did you mean 'smoothing_factor'"
    ):
        build(smoothing_facto=0.9)
    with pytest.raises(ConfigError, match=r"'exp3' has no option 'smoothing_factor'"):
        build("exp3", smoothing_factor=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing_factor": "0.9"}, r"smoothing_factor is '0.9' \(str\); it must be a finite"),
        ({"smoothing_factor": True}, r"smoothing_factor is True \(bool\)"),
        ({"smoothing_factor": math.nan}, r"smoothing_factor is nan \(float\)"),
        ({"smoothing_factor": None}, r"smoothing_factor is None"),
        ({"smoothing_factor": 1}, r"smoothing_factor is 1; it must be at least 0 and below 1"),
        ({"smoothing_factor": -0.1}, r"smoothing_factor is -0.1; it must be at least 0"),
        ({"warmup_steps": -1}, r"warmup_steps is -1; it must be at least 0"),
        ({"warmup_steps": 1.0}, r"warmup_steps is 1.0 \(float\); it must be a whole number"),
        ({"update_every": 0}, r"update_every is 0; it must be at least 1"),
        ({"min_tokens": -1}, r"min_tokens is -1; it must be at least 0"),
        ({"min_tokens": 10**400}, r"min_tokens is 1000"),
        ({"update_every": False}, r"update_every is False \(bool\)"),
        ({"pool": 1}, r"pool is 1 \(int\); it must be true or false"),
        ({"floor": -0.1}, r"floor of domain 'code' is -0.1; it must be between 0 and 1"),
        ({"ceiling": 1.5}, r"ceiling of domain 'code' is 1.5; it must be between 0 and 1"),
        ({"floor": {"code": 2}}, r"floor of domain 'code' is 2.0"),
        ({"floor": {"cod": 0.1}}, r"floor names the domain 'cod'.*did you mean 'code'\?"),
        ({"floor": [0.1]}, r"floor has 1 values for 2 domains \(code, prose\)"),
        ({"floor": [0.1, "x"]}, r"floor is \[0.1, 'x'\]"),
        ({"floor": "0.1"}, r"floor is '0.1' \(str\); it must be a finite number or a mapping or"),
        ({"floor": 10**400}, r"floor is 1000"),
        ({"floor": 0.6}, r"floor: the floors of the 2 domains sum to 1.2.*at most 0.5"),
        ({"ceiling": 0.4}, r"ceiling: the ceilings of the 2 domains sum to 0.8.*at least 0.5"),
        ({"floor": [0.5, 0], "ceiling": [0.4, 1]}, r"floor of domain 'code' is 0.5.*its ceiling"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_the_rule(options, message):
    with pytest.raises(ConfigError, match=f"(?s)mixing method 'odm': {message}"):
        build(**options)


def test_bounds_come_as_number_mapping_list_or_array():
    for floor in (0.3, {"code": 0.3, "prose": 0.3}, [0.3, 0.3], np.array([0.3, 0.3])):
        mixer = build("static", weights=[1, 99], floor=floor)
        np.testing.assert_allclose(mixer.decide(1).sampling_weights, [0.3, 0.7])
    mixer = build("static", weights=[1, 99], floor={"code": 0.2})
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, [0.2, 0.8])
    mixer = build("static", weights=[1, 99], ceiling={"prose": 0.6})
    np.testing.assert_allclose(mixer.decide(1).sampling_weights, [0.4, 0.6])


def test_bounds_that_pin_the_weights_are_allowed():
    third = build("static", domains="abc", weights=[5, 1, 1], floor=1 / 3)
    np.testing.assert_allclose(third.decide(1).sampling_weights, [1 / 3] * 3, atol=1e-12)
    tenth = build("odm", domains="abcdefghij", floor=0.1, ceiling=0.1)
    np.testing.assert_allclose(tenth.decide(1).sampling_weights, [0.1] * 10, atol=1e-12)


def test_a_ceiling_of_zero_keeps_a_domain_out():
    mixer = build("odm", domains="abc", ceiling={"b": 0})
    for step in range(1, 20):
        assert mixer.decide(step).sampling_weights[1] == 0.0
        mixer.observe(Observation(step, loss_sum=[2.0, 0.0, 3.0], token_count=[1, 0, 1]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights has 1 values for 2 domains"),
        ([1.0, -1.0], r"at least 0"),
        ([0, 0], r"one of them above 0"),
        ([1.0, math.nan], r"finite"),
        ([1.0, "2"], r"finite"),
        ({"code": 1.0}, r"says nothing of the domain 'prose'"),
        ({"code": 1.0, "pros": 1.0}, r"did you mean 'prose'"),
        (0.5, r"weights is 0.5; give one number per domain"),
        ("uniform", r"weights is 'uniform'"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        build(weights=weights)


def test_weights_come_as_list_tuple_array_or_mapping_of_any_sum():
    for weights in ([2, 6], (2, 6), np.array([2, 6]), {"prose": 6, "code": 2}):
        assert build("static", weights=weights).decide(1).sampling_weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "at least one domain"),
        (["a", "b", "a"], "'a' is named twice"),
        ("abc", "give a list of names"),
        ([1, 2], "give a list of names"),
        ([""], "give a list of names"),
    ],
)
def test_bad_domains_are_named(domains, message):
    with pytest.raises(ConfigError, match=message):
        build_mixer("static", domains=domains)


@pytest.mark.parametrize("targets", [("a",), ("c", "c")])
def test_a_target_has_a_name_of_its_own(targets):
    with pytest.raises(ConfigError, match=f"'{targets[0]}' is named twice among the domains and"):
        build_mixer("static", domains=["a", "b"], context=RunContext(targets=targets))


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, float, True),
        (np.float32(1), float, True),
        (np.int64(1), int, True),
        (1.0, int, False),
        ("sum", Literal["sum", "softmax"], True),
        ("max", Literal["sum", "softmax"], False),
        (1, Literal[True], False),
        (np.array([1, 2]), Literal["sum", "softmax"], False),
        (None, str | None, True),
        ({"a": 1}, dict[str, float], True),
        ({1: 1}, dict[str, float], False),
        ("ab", list[str], False),
        (["a"], list[str], True),
    ],
)
def test_types_are_read_strictly(value, hint, fitting):
    assert fits(value, hint) is fitting
