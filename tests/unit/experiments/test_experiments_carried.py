"""``fit-law`` over several lengths and sizes, on studies that obey known laws."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np
import pytest

from megatron.errors import ConfigError, RunError
from megatron.experiments.bounds import free_bounds
from megatron.experiments.commands import fit_law
from megatron.experiments.designs import grid
from megatron.experiments.study import PLAN
from megatron.experiments.table import COLUMNS, write_table

DOMAINS = ("code", "prose")
CONSTANT = np.array([1.0, 0.6])
RATE = np.array([[1.2, 0.1], [-0.1, 0.9]])
MIXTURES = grid(free_bounds(2), parts=6)


@pytest.fixture(scope="module", autouse=True)
def _scipy():
    pytest.importorskip("scipy")


def truth(mixture, steps, size=1e4):
    """Losses [2] that fall with steps and size as power laws do, on top of a static law."""
    falling = 40 * float(steps) ** -0.6 * mixture.max() + 3e3 * float(size) ** -0.9
    return CONSTANT + np.exp(-RATE @ mixture) + falling


def sweep(
    folder,
    steps,
    *,
    size=1e4,
    style="cosine",
    decay=None,
    middle=(),
    mixtures=MIXTURES,
    seeds=(1,),
    noise=0.0,
):
    """Write the folder of a sweep at one length and size."""
    random = np.random.default_rng(steps)
    rows, plan = [], []
    for index, mixture in enumerate(mixtures):
        for seed in seeds:
            name, key = f"point-{index}-seed-{seed}", f"{folder.name}-{index}-{seed}"
            for step in (0, *middle, steps):
                # What a cosine shows on its way down is far from what shorter runs end with.
                off = 0.0 if style == "constant" or step == steps else 0.3
                loss = truth(mixture, max(step, 1), size) + off + noise * random.normal(size=2)
                for place, domain in enumerate(DOMAINS):
                    row: dict[str, Any] = {column: kind() for column, kind in COLUMNS.items()}
                    row |= {"run": name, "key": key, "domain": domain, "step": step, "seed": seed}
                    row |= {"last": step == steps, "split": "valid", "weight": mixture[place]}
                    rows.append({**row, "loss": loss[place], "tokens": 100 * step})
                    rows.append({**rows[-1], "split": "test", "loss": math.nan})
            plan.append(
                {
                    "run": name,
                    "key": key,
                    "method": "static",
                    "weights": dict(zip(DOMAINS, mixture.tolist(), strict=True)),
                    "steps": steps,
                    "tokens": 100 * steps,
                    "parameters": size,
                    "schedule": {
                        "style": style,
                        "warmup_steps": 0.01 * steps,
                        "decay_steps": decay or steps,
                    },
                }
            )
    write_table(rows, folder)
    content = {"domain_tokens": dict.fromkeys(DOMAINS, 5000), "runs": plan}
    (folder / PLAN).write_text(json.dumps(content))
    return folder


@pytest.fixture
def place(tmp_path):
    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        return folder

    return make


def fit(studies, *words):
    parser = argparse.ArgumentParser()
    fit_law.add_arguments(parser)
    names = [str(study) for study in studies]
    assert fit_law.run(parser.parse_args([*names, "--replicates", "20", *words])) == 0
    folder = studies[0] / "law"
    return json.loads((folder / "law.json").read_text()), (folder / "law.md").read_text()


def predicted(facts):
    return {tuple(one["mixture"]): np.array(one["losses"]) for one in facts["fitted"]}


def test_a_longer_run_is_reached_from_shorter_ones(place):
    studies = [sweep(place(f"s{steps}"), steps) for steps in (200, 400, 800, 1600)]
    facts, text = fit(studies, "--at-steps", "20000")
    for mixture, losses in predicted(facts).items():
        np.testing.assert_allclose(losses, truth(np.array(mixture), 20000), atol=5e-3)
    assert facts["carried"]["steps_seen"] == [[200, 400, 800, 1600]]
    assert facts["carried"]["step_r2"] > 0.999
    assert facts["carried"]["step_error"] < 5e-3
    assert min(facts["r2"]) > 0.99
    assert "of runs of 20,000 steps with 10,000 parameters" in text
    assert "Extrapolated over steps from 200, 400, 800, 1,600" in text
    assert "Nothing was extrapolated over sizes" in text
    # The mixture is for a run of that length: the cap on passes counts its tokens.
    capped, _ = fit(studies, "--at-steps", "20000", "--max-epochs", "300")
    assert capped["ceiling"] == pytest.approx([300 * 5000 / (100 * 20000)] * 2)


def test_the_middle_of_a_run_at_a_constant_rate_counts(place):
    study = sweep(place("one"), 1600, style="constant", middle=(5, 200, 400, 800))
    facts, _ = fit([study], "--at-steps", "20000")
    assert facts["carried"]["steps_seen"] == [[200, 400, 800, 1600]]  # not in the warm-up
    for mixture, losses in predicted(facts).items():
        np.testing.assert_allclose(losses, truth(np.array(mixture), 20000), atol=5e-3)


def test_the_middle_of_a_cosine_does_not(place):
    study = sweep(place("one"), 1600, middle=(200, 400, 800))
    with pytest.raises(ConfigError, match=r"learning rate falls \(cosine\).*needs three"):
        fit([study], "--at-steps", "20000")
    facts, text = fit([study], "--at-steps", "1600")  # measured: no law is needed
    assert facts["carried"]["step_r2"] is None
    assert "Nothing was extrapolated over steps" in text


def test_a_run_cut_off_in_its_cosine_is_refused(place):
    studies = [sweep(place(f"s{steps}"), steps, decay=5000) for steps in (200, 400, 800)]
    with pytest.raises(ConfigError, match="in the middle of its cosine over 5000 steps"):
        fit(studies, "--at-steps", "20000")


def test_a_larger_model_is_reached_through_both_laws(place):
    studies = [
        sweep(place(f"s{steps}-{size}"), steps, size=size)
        for size in (10_000, 30_000, 100_000, 300_000)
        for steps in (200, 400, 800)
    ]
    facts, text = fit(studies, "--at-steps", "5000", "--at-size", "1e7")
    for mixture, losses in predicted(facts).items():
        np.testing.assert_allclose(losses, truth(np.array(mixture), 5000, 1e7), atol=1e-2)
    assert facts["carried"]["size_r2"] > 0.99
    assert facts["carried"]["size_error"] < 1e-2
    assert "from 10,000, 30,000, 100,000, 300,000" in text
    assert "the largest is missed by" in text
    assert "extrapolation's error is not in them" in text


def test_seeds_are_averaged_and_the_error_on_the_longest_is_told(place):
    studies = [
        sweep(place(f"s{steps}"), steps, seeds=(1, 2, 3), noise=5e-3)
        for steps in (200, 400, 800, 1600)
    ]
    facts, _ = fit(studies, "--at-steps", "3200")
    assert facts["runs"] == len(MIXTURES)
    assert 1e-4 < facts["carried"]["step_error"] < 0.05
    for mixture, losses in predicted(facts).items():
        np.testing.assert_allclose(losses, truth(np.array(mixture), 3200), atol=0.03)


def test_a_study_given_twice_counts_once(place):
    study = sweep(place("one"), 200)
    assert fit([study, study])[0]["fitted"] == fit([study, study], "--at-steps", "200")[0]["fitted"]


def test_what_the_studies_do_not_allow_is_refused(place):
    short, long = sweep(place("short"), 200), sweep(place("long"), 400)
    assert fit([short, long])[0]["carried"]["steps"] == 400  # the longest, as measured
    wide = sweep(place("wide"), 400, size=5e4)
    with pytest.raises(ConfigError, match=r"end at 200, 400 steps; say .*--at-steps"):
        fit([short, wide], "--at-size", "5e4")
    with pytest.raises(ConfigError, match="at 200, 400 steps alone"):
        fit([short, long], "--at-steps", "9000")
    other = sweep(place("other"), 800, mixtures=grid(free_bounds(2), parts=5))
    with pytest.raises(ConfigError, match="no number of steps in common"):
        fit([short, long, other], "--at-steps", "9000")
    large = sweep(place("large"), 200, size=5e4)
    with pytest.raises(ConfigError, match=r"10,000, 50,000 parameters; say .*--at-size"):
        fit([short, large], "--at-steps", "200")
    with pytest.raises(ConfigError, match="needs 3 different steps or sizes"):
        fit([short, large], "--at-size", "1e6")
    with pytest.raises(ConfigError, match="--own-exponents belongs to"):
        fit([short], "--own-exponents")
    for flag, value in (("--at-steps", "0"), ("--at-size", "-1")):
        with pytest.raises(ConfigError, match=flag):
            fit([short], flag, value)


def test_every_mixture_can_have_its_own_exponent(place):
    studies = [sweep(place(f"s{steps}"), steps) for steps in (200, 400, 800)]
    with pytest.raises(ConfigError, match="needs 4 different"):
        fit(studies, "--at-steps", "9000", "--own-exponents")


def test_an_older_plan_and_a_study_of_other_domains_are_refused(place):
    study, other = sweep(place("one"), 200), sweep(place("two"), 400)
    path = other / PLAN
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "domain_tokens": {"code": 1, "verse": 1}}))
    with pytest.raises(ConfigError, match="mixes code, verse"):
        fit([study, other], "--at-steps", "400")
    old = [{k: v for k, v in run.items() if k != "parameters"} for run in plan["runs"]]
    path.write_text(json.dumps({**plan, "runs": old}))
    with pytest.raises(RunError, match="give the command of the study again"):
        fit([study, other], "--at-steps", "400")
