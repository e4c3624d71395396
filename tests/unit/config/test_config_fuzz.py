"""Mutated configurations end in a ConfigError or in a valid Config, never in anything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.campaign.config_fuzz import RICH, misspellings, mutated, outcome

from megatron.config import Config
from megatron.config.canonical import accepted_keys, known_keys
from megatron.config.data import DomainConfig
from megatron.config.mixing import MixingConfig, option_names
from megatron.config.suggest import edit_distance, nearest
from megatron.registry import mixing_methods


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.yml"


def fuzz(file, cases: int, seed: int) -> tuple[int, int]:
    rng, valid = random.Random(seed), 0
    for case in range(cases):
        text, overrides = mutated(rng)
        try:
            valid += isinstance(outcome(file, text, overrides), Config)
        except Exception as error:
            raise AssertionError(f"case {case}: {error!r}\n{overrides}\n{text}") from error
    return valid, cases - valid


def test_base_is_valid(file):
    assert isinstance(outcome(file, RICH, []), Config)


def test_mutations_end_in_an_error_or_a_configuration(file):
    valid, refused = fuzz(file, 300, seed=1)
    assert valid > 20
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_many_mutations(file, seed):
    valid, refused = fuzz(file, 2_000, seed=seed)
    assert valid > 100
    assert refused > 800


def test_one_edit_is_recognised_in_at_least_95_percent():
    keys = known_keys()
    pairs = misspellings(random.Random(3), keys, 600)
    right = sum(nearest(wrong, keys) == name for name, wrong in pairs)
    assert right / len(pairs) >= 0.95, right / len(pairs)


def test_suggestions_reach_the_message(file):
    rng = random.Random(4)
    own = [key for key in accepted_keys() if key not in RICH.replace("-", "_")]
    pairs = misspellings(rng, own, 60)
    right = 0
    for name, wrong in pairs:
        message = outcome(file, RICH + f"{wrong}: 1\n", [])
        assert isinstance(message, str)
        assert ".yml:25: " in message
        right += f"did you mean '{name}'?" in message
    assert right / len(pairs) >= 0.95, right / len(pairs)


def test_suggestions_inside_blocks(file):
    rng = random.Random(5)
    odm = [*option_names(mixing_methods["odm"]), *(set(MixingConfig.model_fields) - {"options"})]
    right = total = 0
    for block, names in (
        ("mixing", sorted(odm)),
        ("domains.code", sorted(DomainConfig.model_fields)),
        ("optimizer.params", ["lr", "betas", "eps", "weight_decay"]),
        ("fp16", ["enabled", "loss_scale", "hysteresis", "min_loss_scale"]),
        ("zero_optimization", ["stage", "overlap_comm", "reduce_bucket_size"]),
    ):
        for name, wrong in misspellings(rng, names, 20):
            message = outcome(file, RICH, [f"{block}.{wrong}=1"])
            assert isinstance(message, str)
            right += f"did you mean '{name}'?" in message
            total += 1
    assert right / total >= 0.95, right / total


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("abc", "abc", 0), ("abc", "acb", 1), ("abc", "abd", 1), ("abc", "ab", 1), ("abc", "xabc", 1),
     ("abc", "cab", 2), ("a", "", 1), ("abcdef", "ghijkl", 4)],
)  # fmt: skip
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second, 3) == distance
    assert edit_distance(second, first, 3) == distance


def test_far_names_are_not_suggested():
    assert nearest("completely_else", known_keys()) is None
    assert nearest("LR", known_keys()) == "lr"
