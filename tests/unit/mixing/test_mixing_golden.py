"""The recorded trajectories of the five bandits, through the public API."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_sampling_utils import Observation, build_mixer

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "bandits.json").read_text())
CASES = [
    pytest.param(method, case, id=f"{method}-K{case['K']}")
    for case in GOLDEN["cases"]
    for method in case["expected"]
]


def feed(method, case, *, tokens=lambda step, domain: 7.0):
    options = {} if method in ("exp3", "ema") else {"smoothing_factor": case["alpha"]}
    count = case["K"]
    mixer = build_mixer(
        method,
        domains=[f"d{i}" for i in range(count)],
        weights=case["initial_weights"],
        **options,
    )
    for observed in case["observations"]:
        step = observed["step"]
        pairs = list(zip(observed["seen"], observed["loss"], strict=True))
        if method in ("ema", "smoothed_mean_exp"):  # recorded one domain at a time
            pairs = pairs[:1]
        loss_sum, token_count = [0.0] * count, [0.0] * count
        for domain, loss in pairs:
            token_count[domain] = tokens(step, domain)
            loss_sum[domain] = loss * token_count[domain]
        mixer.observe(Observation(step, loss_sum=loss_sum, token_count=token_count))
        yield mixer.decide(step=step + 1).sampling_weights


def test_the_golden_file_holds_all_five_methods():
    assert len(CASES) == 15
    assert {m for case in GOLDEN["cases"] for m in case["expected"]} == {
        "odm",
        "smoothed_mean",
        "smoothed_mean_exp",
        "exp3",
        "ema",
    }


@pytest.mark.parametrize(("method", "case"), CASES)
def test_trajectory(method, case):
    trajectory = np.array(list(feed(method, case)))
    np.testing.assert_allclose(trajectory, case["expected"][method], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "case"), CASES[:5])
def test_the_means_count_and_not_the_tokens(method, case):
    def tokens(step, domain):
        return float(2 ** ((step * 7 + domain) % 9))  # powers of two divide out exactly

    np.testing.assert_allclose(
        list(feed(method, case)), list(feed(method, case, tokens=tokens)), rtol=0, atol=1e-12
    )
