"""The ready configurations name real methods and real options."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.mixing import with_signals

from data_sampling_utils import Observation, RunContext, available_methods, build_mixer
from megatron.registry import mixing_methods

FOLDER = Path(__file__).parents[3] / "configs" / "mixing"
FILES = sorted(FOLDER.glob("*.yml"))
BANDITS = {"odm", "smoothed_mean", "smoothed_mean_exp", "exp3", "ema"}
# Not the method's.
SHARED = {"method", "draw", "unit", "weights", "weights_alpha", "validation_samples"}
QUICKSTART_STEPS, QUICKSTART_DOMAINS = 200, 7


def block(file):
    content = yaml.safe_load(file.read_text())
    # The quickstart's own method takes the folder as it is; every other one makes its own.
    name = {} if file.stem == "odm" else {"run_name": file.stem}
    assert content == {**name, "mixing": content["mixing"]}
    return content["mixing"]


def products(mixing, folder):
    """Put small products of an earlier run where the ready file expects the quickstart's."""
    row = {"a": 0.5, "b": 0.5}
    (folder / "mixture.jsonl").write_text(json.dumps({"step": 1, "probability": row}) + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid_loss": row}) + "\n")
    for key in {"ledger", "targets_from", "reference"} & mixing.keys():
        assert mixing[key] == "runs/quickstart"
        mixing[key] = str(folder)
    return mixing


def test_every_method_has_one():
    assert {block(file)["method"] for file in FILES} == set(available_methods())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_builds(file, tmp_path):
    mixing = products(block(file), tmp_path)
    options = {name: value for name, value in mixing.items() if name not in SHARED}
    context = RunContext(
        total_steps=100, tokens_per_step=1000, vocab_size=100, count_losses=np.zeros_like
    )
    mixer = build_mixer(mixing["method"], domains=["a", "b"], context=context, **options)
    assert mixer.decide(1).sampling_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", sorted(BANDITS))
def test_the_bandits_draw_as_their_papers_assume(name):
    mixing = block(FOLDER / f"{name}.yml")
    assert mixing["method"] == name
    assert mixing["draw"] == "multinomial"


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.stem in BANDITS or f.stem == "ado_paper"], ids=lambda f: f.stem
)
def test_what_it_spells_out_are_the_defaults(file):
    """A ready file of a bandit changes no option behind the reader's back."""
    mixing = block(file)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(mixing_methods[mixing["method"]].options)
    }
    for name in set(mixing) - SHARED:
        assert mixing[name] == defaults[name]


def steps_that_change(mixing):
    """Drive a ready file's mixer through the quickstart's steps; return where it changed p."""
    names = [f"d{i}" for i in range(QUICKSTART_DOMAINS)]
    options = {name: value for name, value in mixing.items() if name not in SHARED}
    if mixing["method"] in ("dynamic_loading", "velocitune"):
        del options["targets_from"]
        options["targets"] = [1.0] * len(names)
    context = RunContext(vocab_size=100, count_losses=np.zeros_like)
    mixer = build_mixer(mixing["method"], domains=names, context=context, **options)
    changes, before, probing = [], None, []
    for step in range(1, QUICKSTART_STEPS + 1):
        level = 5.0 / step**0.3
        losses = np.array([level * (1 + 0.1 * k) for k in range(len(names))])
        decision = mixer.decide(step)
        if decision.validate:
            mixer.observe(Observation(step - 1, valid_loss=losses))
            decision = mixer.decide(step)
        assert not decision.validate
        probing.append(decision.probe is not None)
        observation = Observation(step, loss_sum=losses * 100, token_count=[100] * len(names))
        if decision.measure:
            decision = mixer.foresee(with_signals(observation))
        if decision.probe is None:
            weights = [decision.sampling_weights, decision.loss_weights]
            if before is not None and not all(map(np.array_equal, before, weights)):
                changes.append(step)
            before = weights
        mixer.observe(with_signals(observation))
    left = sum(a and not b for a, b in itertools.pairwise(probing))
    return changes, left


@pytest.mark.parametrize(
    "name",
    [
        "ado",
        "aioli",
        "auto",
        "doge",
        "doremi",
        "dynamic_loading",
        "naive_validation",
        "skillit",
        "validation_gap",
        *sorted(BANDITS),
    ],
)
def test_its_cadence_fits_the_quickstart(name):
    changes, left = steps_that_change(block(FOLDER / f"{name}.yml"))
    assert len(changes) >= 3
    assert left >= 2 or name != "aioli"
