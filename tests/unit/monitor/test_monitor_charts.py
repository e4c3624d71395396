"""TensorBoard, Weights & Biases and Comet, each really written and read back."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron.errors import ConfigError, MissingExtraError, RunError
from megatron.monitor import SinkGroup, StepRecord, ValidationRecord, build_sinks
from megatron.monitor.charts import ChartSink, estimate, perplexity, validation_scalars
from megatron.monitor.console import ConsoleSink
from megatron.monitor.identity import stored_identity
from megatron.monitor.jsonl import JsonlSink
from megatron.monitor.record import TaskRecord

ROOT = Path(__file__).resolve().parents[3]


def record(step: int, **more: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "step": step,
        "domains": ("a", "b"),
        "loss": 4.0 / step,
        "learning_rate": 1e-3,
        "probability": [0.25, 0.75],
        "domain_loss": [1.0 * step, np.nan],
        "tokens": [8, 0],
        "samples": [4, 0],
        "epochs": [0.5, 0.0],
        "seconds": 2.0,
        "tokens_per_second": 4.0,
        "estimates": {"estimated_reward": [0.5, 0.25], "rate": 0.125, "name": "x"},
    }
    return StepRecord(**{**fields, **more})


VALIDATION = ValidationRecord(
    step=4,
    valid_loss={"a": 1.0, "b": 3.0},
    bits_per_byte={"a": 0.5},
    weights={"a": 0.75, "b": 0.25},
)


class Collect(ChartSink):
    """Keeps the points."""

    def __init__(self) -> None:
        super().__init__(log_interval=2)
        self.points: list[tuple[int, dict[str, float]]] = []

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        pass

    def emit(self, scalars: dict[str, float], step: int) -> None:
        self.points.append((step, scalars))


def test_points_have_the_names_that_dashboards_know() -> None:
    sink = Collect()
    sink.start(4, {"samples_seen": {"a": 10, "b": 30}})
    for step in (5, 6):
        sink.step(record(step))
    sink.validation(VALIDATION)
    found = {"arc": {"acc": 0.25, "acc_norm": 0.5}, "wiki": {"word_perplexity": float("inf")}}
    sink.tasks(TaskRecord(step=6, tasks=found))
    sink.flush()
    sink.close()
    (step, train), (_, measured), answered = sink.points
    assert answered == (6, {"test/arc/acc": 0.25, "test/arc/acc_norm": 0.5})
    assert step == 6
    assert train["train/lm_loss"] == pytest.approx(4 / 6)
    assert train["train/lm_loss/a"] == 5.5  # over steps 5 and 6
    assert "train/lm_loss/b" not in train  # absent: no point, not a zero
    assert train["train/iterations/a"] == 18
    assert train["train/percent/a"] == 37.5
    assert train["train/epochs/a"] == 0.5
    assert train["train/_probabilities/b"] == 0.75
    assert train["train/_estimated_reward/b"] == 0.25
    assert train["train/_rate"] == 0.125
    assert train["train/learning_rate"] == 1e-3
    assert train["runtime/samples_per_sec"] == 2.0
    assert train["runtime/tokens_per_sec"] == 4.0
    assert train["runtime/iteration_time"] == 2.0
    assert measured["validation/lm_loss/b"] == 3.0
    assert measured["validation/lm_loss_ppl/a"] == pytest.approx(np.e)
    assert measured["validation/avg_lm_loss"] == 2.0
    assert measured["validation/weighted_avg_lm_loss"] == 1.5
    assert measured["validation/weighted_avg_ppl"] == pytest.approx(0.75 * np.e + 0.25 * np.e**3)
    assert measured["validation/bits_per_byte/a"] == 0.5


def test_what_cannot_be_drawn_is_left_out() -> None:
    assert perplexity(1e6) == float("inf")
    huge = ValidationRecord(step=1, valid_loss={"a": 1e6, "b": float("nan")}, split="test")
    scalars = validation_scalars(huge)
    assert scalars == {"test/lm_loss/a": 1e6, "test/avg_lm_loss": 1e6}
    assert estimate("x", ("a", "b"), {"a": 1, "c": "no"}) == {"x/a": 1.0}
    assert estimate("x", ("a", "b"), np.array([1.0, 2.0])) == {"x/a": 1.0, "x/b": 2.0}
    assert estimate("x", ("a", "b"), [[1], [2]]) == {}
    assert estimate("x", ("a", "b"), True) == {}


class Failing(Collect):
    """A service whose connection is lost at the second point."""

    error: Exception = OSError("connection lost")

    def emit(self, scalars: dict[str, float], step: int) -> None:
        super().emit(scalars, step)
        if len(self.points) == 2:
            raise self.error


def test_a_failing_chart_costs_a_chart_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    failing, healthy = Failing(), Collect()
    group = SinkGroup([failing, healthy])
    group.start(None, {})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 7):
            group.step(record(step))
    assert len(failing.points) == 2
    assert len(healthy.points) == 4
    assert caplog.text.count("Failing failed and is off") == 1
    assert list(group) == [healthy]


def test_a_failing_ledger_ends_the_run() -> None:
    ledger = Failing()
    ledger.essential = True
    group = SinkGroup([ledger, Collect()])
    group.step(record(1))
    with pytest.raises(OSError, match="connection lost"):
        group.step(record(2))
    full = Failing()
    full.error = RunError("no space")
    group = SinkGroup([full])
    group.step(record(1))
    with pytest.raises(RunError, match="no space"):
        group.step(record(2))


def test_closing_closes_all() -> None:
    closed = []

    class Sour(Collect):
        def close(self) -> None:
            closed.append(self)
            raise OSError("sour")

    first, second = Sour(), Sour()
    second.essential = True
    group = SinkGroup([first, second, third := Sour()])
    with pytest.raises(OSError, match="sour"):
        group.close()
    assert closed == [first, second, third]
    group.close()


@pytest.mark.option("log_interval")
def test_only_rank_0_has_sinks(tmp_path: Path) -> None:
    settings = SimpleNamespace(log_interval=3, use_wandb=True)
    group = build_sinks(settings, tmp_path / "run", rank=1)
    assert len(group) == 0
    group.start(None, {})
    group.step(record(1))
    group.close()
    assert not (tmp_path / "run").exists()
    group = build_sinks(SimpleNamespace(log_interval=3), tmp_path / "run", rank=0)
    assert [type(sink) for sink in group] == [JsonlSink, ConsoleSink]


@pytest.mark.parametrize(
    ("option", "library", "extra"),
    [
        ("use_tensorboard", "tensorboard", "tensorboard"),
        ("use_wandb", "wandb", "wandb"),
        ("use_comet", "comet_ml", "comet"),
    ],
)
def test_a_missing_library_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, library: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    if option == "use_tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=rf"{option}.*'{library}'.*neomix\[{extra}\]"):
        build_sinks(SimpleNamespace(**{option: True}), tmp_path)


def test_identity_is_kept_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "id"
    assert stored_identity(path, lambda: "one", resume=True) == ("one", False)
    assert stored_identity(path, lambda: "two", resume=True) == ("one", True)
    assert stored_identity(path, lambda: "three", resume=False) == ("three", False)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(RunError, match="cannot be used"):
        stored_identity(blocked / "id", lambda: "x", resume=False)


@pytest.mark.option("tensorboard_dir")
def test_tensorboard_hides_what_is_run_again(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("torch")
    for resume_step, until in ((None, 6), (3, 8)):
        settings = SimpleNamespace(log_interval=1, tensorboard_dir=str(tmp_path / "events"))
        group = build_sinks(settings, tmp_path, console=False)
        group.start(resume_step, {})
        for step in range((resume_step or 0) + 1, until + 1):
            group.step(record(step, loss=float(step) if resume_step else -1.0))
        group.flush()
        group.close()
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/lm_loss")]
    assert points == [(1, -1.0), (2, -1.0), (3, -1.0), *((s, float(s)) for s in range(4, 9))]
    assert [event.step for event in events.Scalars("train/epochs/a")] == list(range(1, 9))


SERVICE = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_monitor_charts import VALIDATION, record
from megatron.monitor import build_sinks
settings = SimpleNamespace(log_interval=2, comet_tags=("t",), comet_others={"note": 7},
                           wandb_project="p", comet_project="p", use_wandb=True, use_comet=True)
resume = int(sys.argv[4])
group = build_sinks(settings, sys.argv[3], console=False)
group.start(resume or None, {"config": {"alpha": 0.5}})
for step in range(resume + 1, resume + 5):
    group.step(record(step))
if not resume:
    group.validation(VALIDATION)
group.flush()
assert len(group) == 3, "the service was switched off"
group.close()
import comet_ml, wandb.env
assert not comet_ml.error_tracking.enabled_in_config()
assert not wandb.env.error_reporting_enabled()
"""


def use_services(folder: Path, resume: int) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "COMET_MODE": "offline"}
    login = ("COMET_API_KEY", "WANDB_API_KEY")
    for name in (*login, "COMET_ERROR_TRACKING_ENABLE", "WANDB_ERROR_REPORTING"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SERVICE, str(ROOT), str(Path(__file__).parent)]
    command += [str(folder), str(resume)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, cwd=folder
    )
    assert done.returncode == 0, done.stderr


def test_offline_services_go_on_in_the_same_run(tmp_path: Path) -> None:
    """Weights & Biases and Comet, without a network, over an interruption after step 4."""
    pytest.importorskip("wandb")
    pytest.importorskip("comet_ml")
    for resume in (0, 4):
        use_services(tmp_path, resume)
    check_wandb(tmp_path)
    check_comet(tmp_path)


def check_wandb(folder: Path) -> None:
    identity = (folder / "wandb_run_id").read_text().strip()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{identity}"}
    assert all(b"train/lm_loss" in file.read_bytes() for file in files)
    assert sum(b"validation/lm_loss/b" in file.read_bytes() for file in files) == 1


def check_comet(folder: Path) -> None:
    key = (folder / "comet_experiment_key").read_text().strip()
    archives = sorted(folder.glob("comet/*.zip"), key=lambda path: path.stat().st_mtime)
    assert len(archives) == 2
    assert all(archive.name.startswith(key) for archive in archives)
    seen: dict[int, float] = {}
    for archive in archives:
        with zipfile.ZipFile(archive) as content:
            messages = map(json.loads, content.read("messages.json").decode().splitlines())
            for message in messages:
                metric = message["payload"].get("metric")
                if metric and metric["metricName"] == "train/lm_loss":
                    seen[metric["step"]] = metric["metricValue"]
    assert seen == {1: 4.0, 2: 2.0, 4: 1.0, 6: pytest.approx(4 / 6), 8: 0.5}


def test_a_service_without_login_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    group = build_sinks(SimpleNamespace(use_wandb=True), tmp_path, console=False)
    with pytest.raises(ConfigError, match=r"wandb login.*WANDB_MODE=offline"):
        group.start(None, {})
