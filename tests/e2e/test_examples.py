"""The examples for other training loops: they run, resume, and keep to the contract."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.source import ROOT

from data_sampling_utils import Observation, Signal, available_methods, build_mixer
from examples.drawing import Draw
from megatron.registry import mixing_methods

PLAIN, HUGGINGFACE = (
    str(ROOT / "examples" / name) for name in ("plain_pytorch.py", "huggingface_trainer.py")
)
NAMES = ("cycle", "walk", "sum", "noise")


def run(*arguments: str | Path) -> str:
    """Run a script to its end; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def plain(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the plain loop in this process; return what it printed."""
    from examples.plain_pytorch import main

    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def course(printed: str) -> dict[int, tuple[float, ...]]:
    """Return the printed shares by step."""
    rows = re.findall(r"^step +(\d+)  (.*)$", printed, flags=re.MULTILINE)
    return {
        int(step): tuple(float(share) for share in re.findall(r"([\d.]+)%", shares))
        for step, shares in rows
    }


def losses(printed: str) -> dict[str, float]:
    """Return the held-out losses printed last."""
    (line,) = re.findall(r"^held-out loss  (.*)$", printed, flags=re.MULTILINE)
    return {name: float(loss) for name, loss in re.findall(r"(\w+) ([\d.]+)", line)}


# What does not depend on torch: turning weights into samples.


def test_counts_follow_the_weights_and_passes_are_whole() -> None:
    draw = Draw([5, 7, 3], seed=0, multinomial=False)
    weights, drawn = np.array([0.55, 0.3, 0.15]), []
    for step in range(1, 41):
        samples = draw.step(step, weights, 4)
        assert len(samples) == 4
        drawn += samples
        counts = np.bincount([domain for domain, _ in drawn], minlength=3)
        assert np.abs(counts - 4 * step * weights).max() < 1.5
    for domain, size in enumerate((5, 7, 3)):
        order = [index for d, index in drawn if d == domain]
        for start in range(0, len(order) - size, size):
            assert sorted(order[start : start + size]) == list(range(size))


def test_a_draw_goes_on_as_it_would_have() -> None:
    weights = np.array([0.7, 0.2, 0.1])
    for multinomial in (False, True):
        whole = Draw([5, 7, 3], seed=3, multinomial=multinomial)
        first = [whole.step(step, weights, 5) for step in range(1, 9)]
        state = json.loads(json.dumps(whole.state_dict()))
        later = [whole.step(step, weights, 5) for step in range(9, 17)]
        resumed = Draw([5, 7, 3], seed=3, multinomial=multinomial)
        resumed.load_state_dict(state)
        assert [resumed.step(step, weights, 5) for step in range(9, 17)] == later
        assert first != later


def test_a_fresh_quota_owes_nothing() -> None:
    draw = Draw([9, 9], seed=0, multinomial=False)
    for step in range(1, 4):
        draw.step(step, np.array([0.9, 0.1]), 1)  # the second is owed a part of a sample
    block = [
        domain
        for step in range(4, 8)
        for domain, _ in draw.step(step, np.array([0.5, 0.5]), 1, fresh_quota=step == 4)
    ]
    assert sorted(block) == [0, 0, 1, 1]


# The plain loop.


SMALL: dict[str, list[str]] = {
    "aioli": ["lp_rounds=1", "lp_steps=1", "update_every=8"],
    "ado": ["first_fit=6", "fit_every=6", "smoothing_window=5", "subsample=1"],
    "dynamic_loading": ["targets=[0.1,0.5,1.0,3.2]", "update_every=4"],
    "velocitune": ["targets=[0.1,0.5,1.0,3.2]", "update_every=4"],
    "skillit": ["update_every=4"],
    "naive_validation": ["update_every=4"],
    "doge": ["mu=0.01"],
    "schedule": ['stages=[{"weights":"uniform","fraction":0.5},{"weights":[0.7,0.1,0.1,0.1]}]'],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.pt"
    run(PLAIN, "--method", "static", "--steps", "20", "--model", path)  # as a user would
    return path


@pytest.mark.parametrize("method", available_methods())
def test_the_plain_loop_runs_every_method(
    method: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "mixture.jsonl"
    drawn = ([0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3])
    shares = [dict(zip(NAMES, p, strict=True)) for p in drawn]
    ledger.write_text(
        "".join(
            json.dumps({"step": step, "probability": shares[step % 2]}) + "\n"
            for step in range(1, 25)
        )
    )
    options = [f"--option={text}" for text in SMALL.get(method, [])]
    if method in ("replay", "average_of_ledger"):
        options.append(f"--option=ledger={ledger}")
    if Signal.EXCESS_LOSS.value in mixing_methods[method].needs:
        options += ["--reference", str(reference)]
    printed = plain(capsys, "--method", method, "--steps", "24", "--batch", "8", *options)
    shown = course(printed)
    assert max(shown) == 24
    assert all(sum(row) == pytest.approx(100, abs=0.3) for row in shown.values())
    assert all(np.isfinite(loss) for loss in losses(printed).values())
    fixed = {"static", "average_of_ledger", "doremi", "doge"}  # the latter two weigh losses
    assert (len(set(shown.values())) > 1) is (method not in fixed)


@pytest.mark.parametrize("method", ["odm", "aioli"])
def test_the_plain_loop_resumes_exactly(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--option={text}" for text in SMALL.get(method, [])]
    arguments = ["--method", method, "--steps", "24", "--batch", "8", *options]
    whole = plain(capsys, *arguments)
    state = tmp_path / "state.pt"
    first = plain(capsys, *arguments, "--state", state, "--stop-after", "10")  # within a probe
    second = plain(capsys, *arguments, "--state", state)
    assert "going on after step 10" in second
    assert course(first) | course(second) == course(whole)
    assert losses(second) == losses(whole)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (PLAIN, ["--method", "odd"], "unknown mixing method 'odd'; did you mean 'odm'?"),
        (PLAIN, ["--method", "odm", "--option=smoothing=1"], "has no option 'smoothing'"),
        (HUGGINGFACE, ["--method", "odd"], "unknown mixing method 'odd'"),
        (HUGGINGFACE, ["--resume", "--output_dir", "nowhere"], "nowhere holds no checkpoint"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    script: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    # The Trainer makes its output folder even then.
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", [PLAIN, HUGGINGFACE])
def test_help_is_given(script: str) -> None:
    printed = run(script, "--help")
    assert "--method" in printed
    assert "python examples/" in printed


# The Trainer.


class Seen:
    """A mixer's observations, beside the mixer."""

    def __init__(self, mixer: Any) -> None:
        self.mixer, self.steps = mixer, []
        self._observe = mixer.observe

    def __call__(self, observation: Observation) -> None:
        if not observation.only_validation:
            self.steps.append(observation)
        self._observe(observation)


def trainer(folder: Path, **changes: Any) -> tuple[Any, Seen]:
    """Build the example's trainer; return it and what its controller is told."""
    from examples import huggingface_trainer as example

    options = vars(example.parse([])) | {
        "output_dir": str(folder),
        "steps": 16,
        "cpu": True,
        "option": [("update_every", 1)],
    }
    built = example.build_trainer(argparse.Namespace(**{**options, **changes}))
    seen = Seen(built.mixture.mixer)
    built.mixture.mixer.observe = seen
    return built, seen


def weights_of(built: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in built.model.named_parameters()}


def test_the_trainer_tells_what_was_drawn_and_lost(tmp_path: Path) -> None:
    built, seen = trainer(tmp_path)
    built.train()
    assert [o.step for o in seen.steps] == list(range(1, 17))
    for observation in seen.steps:
        step = observation.step
        assert np.array_equal(observation.vector("sampling_weights"), built.mixture.course[step])
        assert observation.vector("sample_count").sum() == 8
        assert observation.vector("token_count").sum() == 8 * 23
        assert observation.learning_rate == pytest.approx(5e-3)
    # The sum over the domains is the loss that the Trainer logs (means over one step's tokens).
    assert built.args.logging_steps == 1
    logged = [row["loss"] for row in built.state.log_history if "loss" in row]
    told = [o.vector("loss_sum").sum() / o.vector("token_count").sum() for o in seen.steps]
    np.testing.assert_allclose(logged, told, rtol=2e-4)
    first = seen.steps[0]
    assert np.isfinite(first.standard_error).all()
    assert "eval_loss" in built.evaluate()


@pytest.mark.parametrize("weighed", [False, True])
def test_accumulation_changes_nothing(tmp_path: Path, weighed: bool) -> None:
    found = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        built, seen = trainer(tmp_path, batch=batch, accumulation=accumulation)
        if weighed:
            shares = np.array([0.1, 0.4, 0.3, 0.2])
            built.mixture.loss_weights = lambda step, shares=shares: shares
        built.train()
        found.append((built.mixture.course, [o.vector("loss_sum") for o in seen.steps]))
    for weights, sums in found[1:]:
        np.testing.assert_allclose(list(weights.values()), list(found[0][0].values()), atol=1e-5)
        np.testing.assert_allclose(sums, found[0][1], rtol=1e-3)


def test_loss_weights_weigh_the_gradient(tmp_path: Path) -> None:
    """A domain of weight 0 teaches nothing; weights of equal size change nothing."""
    ended = {}
    for name, shares in (("plain", None), ("equal", [2.0] * 4), ("without", [1.0, 1.0, 1.0, 0.0])):
        built, _ = trainer(tmp_path, method="static", option=[], steps=6)
        given = None if shares is None else np.array(shares)
        built.mixture.loss_weights = lambda step, given=given: given
        built.train()
        ended[name] = weights_of(built)
    moved = ended["without"]["lm_head.weight"] - ended["plain"]["lm_head.weight"]
    assert np.abs(moved).max() > 1e-4
    for name, value in ended["plain"].items():
        np.testing.assert_allclose(ended["equal"][name], value, atol=1e-6)


@pytest.mark.parametrize(("workers", "ahead"), [(0, 1), (2, 4)])
def test_the_trainer_resumes_exactly(tmp_path: Path, workers: int, ahead: int) -> None:
    """Also where a data loader has fetched steps that had not trained when it was saved."""
    common: dict[str, Any] = {"workers": workers, "save_steps": 6}
    whole, seen = trainer(tmp_path / "whole", **common)
    whole.train()
    first, told = trainer(tmp_path / "cut", **common, stop_after=6)
    first.train()
    state = json.loads((tmp_path / "cut/checkpoint-6/trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["mixture"]
    assert saved["trained"] == 6
    assert len(saved["ahead"]) >= ahead
    second, later = trainer(tmp_path / "cut", **common)
    second.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-6"))
    both = told.steps + later.steps
    assert [o.step for o in both] == [o.step for o in seen.steps]
    for one, other in zip(both, seen.steps, strict=True):
        for name in ("sampling_weights", "loss_sum", "token_count"):
            assert np.array_equal(one.vector(name), other.vector(name)), (one.step, name)
    for name, value in weights_of(whole).items():
        assert np.array_equal(value, weights_of(second)[name]), name


def test_held_out_losses_are_measured_when_asked_for(tmp_path: Path) -> None:
    built, _ = trainer(tmp_path, method="naive_validation", option=[("update_every", 4)])
    measured = []
    measure = built.mixture.measure
    built.mixture.measure = lambda: measured.append(measure()) or measured[-1]
    built.train()
    assert len(measured) == 3  # before steps 5, 9 and 13, after each of the updates
    assert all(loss.shape == (4,) and np.isfinite(loss).all() for loss in measured)
    assert len({tuple(p) for p in built.mixture.course.values()}) >= 3


def test_a_checkpoint_without_a_mixture_is_refused(tmp_path: Path) -> None:
    from megatron.errors import ConfigError

    built, _ = trainer(tmp_path, save_steps=6, stop_after=6)
    built.train()
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["mixture"]
    path.write_text(json.dumps(state))
    again, _ = trainer(tmp_path)
    with pytest.raises(ConfigError, match="step 6 holds no state of a mixture"):
        again.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize(
    "method",
    [
        name
        for name in available_methods()
        if {"excess_loss", "gradient_alignment", "batch_valid_loss"} & mixing_methods[name].needs
    ],
)
def test_a_method_that_needs_more_is_refused(method: str, tmp_path: Path) -> None:
    from megatron.errors import ConfigError

    option = [("reference", "somewhere")] if method == "doremi" else []
    with pytest.raises(ConfigError, match="which the Trainer does not give"):
        trainer(tmp_path, method=method, option=option)


@pytest.mark.slow
def test_two_processes_are_one_of_twice_the_batch(tmp_path: Path) -> None:
    arguments = ["--cpu", "--steps", "16", "--output_dir", str(tmp_path)]
    one = run(HUGGINGFACE, *arguments, "--batch", "8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = run(*launcher, HUGGINGFACE, *arguments, "--batch", "4")
    assert course(two).keys() == course(one).keys()
    for step, shares in course(one).items():
        assert course(two)[step] == pytest.approx(shares, abs=0.11)
    for name, loss in losses(one).items():
        assert losses(two)[name] == pytest.approx(loss, abs=2e-3)


def test_a_mixer_is_what_the_package_gives() -> None:
    """The examples build controllers through the public module alone."""
    for script in (PLAIN, HUGGINGFACE):
        text = Path(script).read_text()
        imported = re.findall(r"^from (megatron\S*|data_sampling_utils)", text, re.MULTILINE)
        assert set(imported) == {"data_sampling_utils", "megatron.errors"}
    assert build_mixer("odm", domains=list(NAMES)).domains == NAMES
