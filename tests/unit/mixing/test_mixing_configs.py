"""The ready configurations name real methods and real options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from data_sampling_utils import RunContext, available_methods, build_mixer
from megatron.registry import mixing_methods

FOLDER = Path(__file__).parents[3] / "configs" / "mixing"
FILES = sorted(FOLDER.glob("*.yml"))
BANDITS = {"odm", "smoothed_mean", "smoothed_mean_exp", "exp3", "ema"}
SHARED = {"method", "draw", "weights", "weights_alpha"}  # of every method, not the method's own


def block(file):
    content = yaml.safe_load(file.read_text())
    assert list(content) == ["mixing"]
    return content["mixing"]


def test_every_method_has_one():
    assert {block(file)["method"] for file in FILES} == set(available_methods())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_builds(file):
    mixing = block(file)
    options = {name: value for name, value in mixing.items() if name not in SHARED}
    context = RunContext(total_steps=100, tokens_per_step=1000)
    mixer = build_mixer(mixing["method"], domains=["a", "b"], context=context, **options)
    assert mixer.decide(1).sampling_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", sorted(BANDITS))
def test_the_bandits_draw_as_their_papers_assume(name):
    mixing = block(FOLDER / f"{name}.yml")
    assert mixing["method"] == name
    assert mixing["draw"] == "multinomial"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_it_spells_out_are_the_defaults(file):
    """A ready file of a bandit changes no option behind the reader's back."""
    mixing = block(file)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(mixing_methods[mixing["method"]].options)
    }
    for name in set(mixing) - SHARED - {"stages", "interpolation"}:
        assert mixing[name] == defaults[name]
