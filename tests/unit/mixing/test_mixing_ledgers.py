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
        DataError, match=r"cannot read .*quickstart/mixture.jsonl.*train.py -d configs local/quick"
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
