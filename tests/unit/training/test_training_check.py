"""What a check and a launch say about data and machine, each in one message and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import runs

FOLDER = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "data"
    runs.make_data(folder)
    return folder


def write(tmp_path: Path, data: Path, **changes: Any) -> Path:
    return runs.write_config(
        tmp_path / "config.yml", runs.config(data, tmp_path / "run", **changes)
    )


def test_a_sound_run_is_reported_and_nothing_is_started(tmp_path: Path, data: Path) -> None:
    file = write(tmp_path, data, async_save=True)
    done = runs.run("--check", "train.py", file)
    assert done.returncode == 0, done.stderr
    for word in (
        "2 per rank × 2 accumulated × 2 data ranks = 8 samples",
        "parameters",
        "memory per rank",
        "disk:",
        "async_save: a copy of that size in host memory, 1 MiB for all ranks",
        "epochs",
        *runs.DOMAINS,
    ):
        assert word in done.stdout
    assert not (tmp_path / "run").exists()


def test_check_imports_no_torch(tmp_path: Path, data: Path) -> None:
    file = write(tmp_path, data)
    program = (
        "import sys, deepy\n"
        f"code = deepy.main(['--check', 'train.py', {str(file)!r}])\n"
        "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=FOLDER,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def misspelt(content: dict[str, Any], data: Path) -> list[str]:
    content["num_layer"] = content.pop("num_layers")
    return ["num_layer", "num_layers"]


def wrong_type(content: dict[str, Any], data: Path) -> list[str]:
    content["train_iters"] = "many"
    return ["train_iters", "many"]


def missing_file(content: dict[str, Any], data: Path) -> list[str]:
    content["domains"]["walk"]["train"] = str(data / "wolk")
    return ["wolk", "did you mean", "walk"]


def truncated(content: dict[str, Any], data: Path) -> list[str]:
    for suffix in (".bin", ".idx"):
        shutil.copy(data / f"walk{suffix}", data / f"short{suffix}")
    with (data / "short.bin").open("r+b") as file:
        file.truncate((data / "walk.bin").stat().st_size - 10)
    content["domains"]["walk"]["train"] = str(data / "short")
    return ["short.bin", "truncated"]


def too_few_tokens(content: dict[str, Any], data: Path) -> list[str]:
    content["seq_length"] = 10_000_000
    return ["window", "seq_length"]


def foreign_vocabulary(content: dict[str, Any], data: Path) -> list[str]:
    del content["vocab_size"]
    return ["vocab_size"]


def impossible_floor(content: dict[str, Any], data: Path) -> list[str]:
    content["mixing"]["floor"] = 0.5
    return ["floor"]


def batch_arithmetic(content: dict[str, Any], data: Path) -> list[str]:
    content["train_batch_size"] = 9
    return ["train_batch_size", "9"]


def half_precision(content: dict[str, Any], data: Path) -> list[str]:
    content["fp16"] = {"enabled": True}
    return ["fp16", "bf16"]


def skipping_under_stage_0(content: dict[str, Any], data: Path) -> list[str]:
    content["on_nonfinite"] = "skip(2)"
    content["deepspeed_extra_args"] = {"zero_optimization": {"stage": 0}}
    return ["skip(2)", "stage 0"]


@pytest.mark.parametrize(
    "spoil",
    [
        misspelt,
        wrong_type,
        missing_file,
        truncated,
        too_few_tokens,
        foreign_vocabulary,
        impossible_floor,
        batch_arithmetic,
        half_precision,
        skipping_under_stage_0,
    ],
    ids=lambda spoil: spoil.__name__,
)
@pytest.mark.parametrize("check", [True, False], ids=["check", "launch"])
def test_bad_input_is_one_message_and_code_2(
    tmp_path: Path,
    data: Path,
    spoil: Callable[[dict[str, Any], Path], list[str]],
    check: bool,
) -> None:
    content = runs.config(data, tmp_path / "run")
    words = spoil(content, data)
    file = runs.write_config(tmp_path / "config.yml", content)
    done = runs.run(*(["--check"] if check else []), "train.py", file)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_key_written_twice_is_refused(tmp_path: Path, data: Path) -> None:
    file = write(tmp_path, data)
    with file.open("a", encoding="utf-8") as out:
        out.write("train-iters: 25\n")
    done = runs.run("--check", "train.py", file)
    assert done.returncode == 2
    assert "train_iters" in done.stderr.replace("-", "_")
    assert f"{file}:{len(file.read_text().splitlines())}" in done.stderr


def test_validation_on_training_data_is_told(tmp_path: Path, data: Path) -> None:
    domains = {
        name: {"train": str(data / name), "valid": str(data / name)} for name in runs.DOMAINS
    }
    domains["noise"]["valid"] = str(data / "drift")
    done = runs.run("--check", "train.py", write(tmp_path, data, domains=domains))
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if "validates on what is trained" in line]
    assert [name for name in runs.DOMAINS if any(f"'{name}'" in line for line in warned)] == list(
        runs.DOMAINS
    )
    assert "200 of 200" in warned[0]


def test_a_method_driven_by_held_out_losses_wants_them_of_every_domain(
    tmp_path: Path, data: Path
) -> None:
    file = write(tmp_path, data, split="90, 0, 10", mixing={"method": "naive_validation"})
    done = runs.run("--check", "train.py", file)
    assert done.returncode == 2
    assert "'naive_validation' is driven by held-out losses" in done.stderr
    assert "has no validation data; give the domain" in done.stderr
    assert "Traceback" not in done.stderr
