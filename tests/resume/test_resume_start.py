"""What a run may start from, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import runs

STEPS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and the configuration file of a finished run of one rank."""
    folder = tmp_path_factory.mktemp("start")
    runs.make_data(folder / "data")
    file = write(folder, folder / "data", folder / "run")
    runs.train(file)
    return folder / "data", file


def write(folder: Path, data: Path, run_dir: Path, **changes: Any) -> Path:
    content = runs.config(data, run_dir, **{"num_gpus": 1, "train_iters": STEPS, **changes})
    return runs.write_config(folder / "config.yml", content)


@pytest.mark.option("finetune", "load")
def test_finetune_takes_the_weights_and_begins_anew(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, source = finished
    old = Path(yaml.safe_load(source.read_text())["run_dir"])
    file = write(
        tmp_path, data, tmp_path / "run", load=str(old / "checkpoints"), finetune=True, num_gpus=2
    )
    runs.train(file)
    before = [r for r in runs.records(old, "metrics") if "valid_loss" in r][-1]["valid_loss"]
    after = runs.records(tmp_path / "run", "metrics")[0]
    assert after["step"] == 0
    for name, loss in before.items():
        assert after["valid_loss"][name] == pytest.approx(loss, rel=1e-6)
    assert [r["step"] for r in runs.records(tmp_path / "run", "mixture")] == list(
        range(1, STEPS + 1)
    )
    # The data begins anew as well.
    samples = [runs.records(run, "samples") for run in (old, tmp_path / "run")]
    assert samples[0] == samples[1]


@pytest.mark.option("iteration")
def test_one_checkpoint_can_be_started_from_with_its_optimizer(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, source = finished
    old = Path(yaml.safe_load(source.read_text())["run_dir"]) / "checkpoints" / "global_step3"
    losses: dict[bool, list[dict[str, Any]]] = {}
    for optimizer in (False, True):
        file = write(
            tmp_path,
            data,
            tmp_path / f"run-{optimizer}",
            load=str(old),
            finetune=True,
            finetune_optimizer=optimizer,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            train_iters=3,
        )
        told = runs.run("--check", "train.py", file)
        assert f"from the weights {'and the optimizer ' * optimizer}of {old}" in told.stdout
        runs.train(file)
        found = runs.records(tmp_path / f"run-{optimizer}", "metrics")
        losses[optimizer] = [r["valid_loss"] for r in found if "valid_loss" in r]
    # The same weights, not those of the newest checkpoint; then the moments tell.
    newest = [r for r in runs.records(old.parents[1], "metrics") if "valid_loss" in r][-1]
    assert losses[True][0] == losses[False][0] != newest["valid_loss"]
    assert losses[True][1] != losses[False][1]
    gone = write(tmp_path, data, tmp_path / "gone", load=str(old.with_name("global_step2")))
    refused = runs.run("train.py", gone)
    assert refused.returncode == 2
    assert "global_step2, which holds no" in refused.stderr


def test_other_data_under_the_same_name_is_refused(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = finished
    file = write(tmp_path, data, tmp_path / "run", exit_interval=3)
    runs.train(file)
    runs.make_data(tmp_path / "other", documents=150)
    changed = write(tmp_path, tmp_path / "other", tmp_path / "run")
    for arguments in (["--check", "train.py", changed], ["train.py", changed]):
        refused = runs.run(*arguments)
        assert refused.returncode == 2
        assert "'walk'" in refused.stderr
        assert "allow_changed_data" in refused.stderr
        assert "Traceback" not in refused.stderr
    runs.train(changed, "--set", "allow_changed_data=true")
    assert len(runs.records(tmp_path / "run", "mixture")) == STEPS


def test_a_checkpoint_of_another_model_is_refused(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, source = finished
    old = Path(yaml.safe_load(source.read_text())["run_dir"])
    file = write(tmp_path, data, tmp_path / "run", load=str(old / "checkpoints"), num_layers=1)
    refused = runs.run("train.py", file)
    assert refused.returncode == 2
    assert "num_layers (checkpoint 2, configuration 1)" in refused.stderr
    assert refused.stderr.count("error:") == 1
