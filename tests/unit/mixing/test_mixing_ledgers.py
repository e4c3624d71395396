"""Methods that repeat a ledger: to the bit, or its average."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer
from megatron.errors import ConfigError, DataError

NAMES = ["a", "b", "c"]


def record_run(path):
    """Run Aioli and write what drew, as the run folder's ledger does."""
    mixer = build_mixer(
        "aioli", domains=NAMES, update_every=12, lp_rounds=1, lp_steps=3, one_hot_factor=0.6
    )
    decisions = []
    with (path / "mixture.jsonl").open("w") as lines:
        for step in range(1, 31):
            decision = mixer.decide(step)
            if decision.validate:
                level = np.array([3.0, 2.0, 2.5]) / step**0.2
                mixer.observe(Observation(step - 1, valid_loss=level))
                decision = mixer.decide(step)
            decisions.append(decision)
            weights = dict(zip(NAMES, decision.sampling_weights.tolist(), strict=True))
            record = {"step": step, "probability": weights}
            for key in ("fresh_quota", "probe"):
                if getattr(decision, key) is not None:
                    record[key] = getattr(decision, key)
            lines.write(json.dumps(record) + "\n")
            mixer.observe(Observation(step, loss_sum=[1, 1, 1], token_count=[1, 1, 1]))
    return decisions


@pytest.mark.parametrize("as_folder", [True, False])
def test_replay_repeats_every_decision(tmp_path, as_folder):
    decisions = record_run(tmp_path)
    ledger = tmp_path if as_folder else tmp_path / "mixture.jsonl"
    mixer = build_mixer("replay", domains=NAMES, ledger=str(ledger))
    for step, recorded in enumerate(decisions, start=1):
        decision = mixer.decide(step)
        assert decision.sampling_weights.tobytes() == recorded.sampling_weights.tobytes()
        assert decision.fresh_quota == recorded.fresh_quota
        assert decision.probe == recorded.probe
        mixer.observe(Observation(step, loss_sum=[9, 1, 1], token_count=[1, 1, 1]))
    last = mixer.decide(1000).sampling_weights
    assert last.tobytes() == decisions[-1].sampling_weights.tobytes()


def test_the_average_holds_throughout(tmp_path):
    decisions = record_run(tmp_path)
    mean = np.mean([decision.sampling_weights for decision in decisions], axis=0)
    mixer = build_mixer("average_of_ledger", domains=["c", "a", "b"], ledger=str(tmp_path))
    for step in (1, 7, 500):
        decision = mixer.decide(step)
        np.testing.assert_allclose(decision.sampling_weights, mean[[2, 0, 1]], atol=1e-15)
        assert decision.fresh_quota is None


@pytest.mark.parametrize("method", ["replay", "average_of_ledger"])
def test_without_a_ledger_it_says_what_to_do(method):
    with pytest.raises(ConfigError, match=rf"'{method}': no ledger; give the mixture.jsonl"):
        build_mixer(method, domains=NAMES)
    with pytest.raises(
        DataError,
        match=r"^cannot read the ledger .*quickstart/mixture.jsonl.*train.py -d configs local",
    ):
        build_mixer(method, domains=NAMES, ledger="runs-of-nobody/quickstart")


@pytest.mark.parametrize("method", ["replay", "average_of_ledger"])
def test_bounds_and_warm_up_go_with_it(method, tmp_path):
    record_run(tmp_path)
    mixer = build_mixer(
        method, domains=NAMES, weights=[8, 1, 1], ledger=str(tmp_path), floor=0.25, warmup_steps=2
    )
    np.testing.assert_allclose(mixer.decide(2).sampling_weights, [0.5, 0.25, 0.25])
    for step in range(3, 20):
        assert (mixer.decide(step).sampling_weights >= 0.25 - 1e-12).all()


EDITED = (
    {"step": 1, "probability": {"a": 0.5, "b": 0.5}, "loss_weight": {"a": 0.25, "b": 1.75}},
    {"step": 2, "probability": {"b": 0.75, "c": 0.25}, "loss_weight": {"b": 1.5, "c": 0.5}},
    {"step": 3, "probability": {"a": 0.125, "c": 0.875}},
)


def write_edited(path):
    text = "".join(json.dumps(line) + "\n" for line in EDITED)
    (path / "mixture.jsonl").write_text(text)


def test_a_ledger_over_an_edit_is_replayed_over_all_its_domains(tmp_path):
    write_edited(tmp_path)
    mixer = build_mixer("replay", domains=["c", "a", "b"], ledger=str(tmp_path))
    rows = ([0, 0.5, 0.5], [0.25, 0, 0.75], [0.875, 0.125, 0])
    for step, row in enumerate(rows, start=1):
        assert mixer.decide(step).sampling_weights.tolist() == row
    assert mixer.decide(1).loss_weights.tolist() == [1.0, 0.25, 1.75]
    assert mixer.decide(2).loss_weights.tolist() == [0.5, 1.0, 1.5]
    average = build_mixer("average_of_ledger", domains=["c", "a", "b"], ledger=str(tmp_path))
    mean = np.mean(rows, axis=0)
    np.testing.assert_allclose(average.decide(9).sampling_weights, mean, atol=1e-15)


@pytest.mark.parametrize(
    ("domains", "named"), [(["a", "b"], "'c' is not in both"), ([*NAMES, "d"], "names 'd', and")]
)
def test_the_domains_of_a_replay_are_those_of_the_ledger(tmp_path, domains, named):
    write_edited(tmp_path)
    with pytest.raises(DataError, match=named):
        build_mixer("replay", domains=domains, ledger=str(tmp_path))
