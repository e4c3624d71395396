from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import runs

import deepy

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(__file__).resolve().parent / "programs"
CONFIG = ["-d", str(ROOT / "configs"), "local/quickstart", "mixing/odm"]


def run(
    *arguments: str, python: tuple[str, ...] = (sys.executable,), **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, str(ROOT / "deepy.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.option("wandb_group")
def test_flags_and_files_come_in_any_order() -> None:
    expected = {
        "user_script": "train.py",
        "conf_file": ["a", "b"],
        "conf_dir": "D",
        "overrides": ["x=1", "y.z=[1, 2]", "hostfile=H", "wandb_group=g"],
        "check": True,
    }
    orders = [
        "--check train.py -d D a b --set x=1|y.z=[1, 2] -H H --wandb_group g",
        "train.py a --set x=1|y.z=[1, 2]|b -d D --check --wandb_group=g --hostfile H",
        "-d D --set x=1|--set|y.z=[1, 2]|train.py a b -H H --wandb_group g --check",
    ]
    for order in orders:
        words = [word for part in order.split(" -") for word in split(part, order)]
        arguments = vars(deepy.parse_arguments(words))
        assert {key: arguments[key] for key in expected} == expected


def split(part: str, order: str) -> list[str]:
    text = part if order.startswith(part) else f"-{part}"
    words: list[str] = []
    for piece in text.split("|"):
        words += [piece] if "[" in piece else piece.split(" ")
    return words


@pytest.mark.parametrize(
    "arguments",
    [["train.py", "--chec"], [], ["train.py", "--check", "--dry-run"], ["train.py", "--set"]],
)
def test_wrong_command_lines_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        deepy.parse_arguments(arguments)
    assert caught.value.code == 2


def test_help_needs_no_library() -> None:
    done = run("--help", python=(sys.executable, "-S"))
    assert done.returncode == 0
    assert "--print-config" in done.stdout
    assert "143" in done.stdout


def copy_project(folder: Path) -> None:
    """Make a checkout without a virtual environment."""
    shutil.copy(ROOT / "deepy.py", folder)
    (folder / "megatron").symlink_to(ROOT / "megatron")


def test_a_python_without_libraries_says_what_to_do(tmp_path: Path) -> None:
    copy_project(tmp_path)
    done = subprocess.run(
        [sys.executable, "-S", str(tmp_path / "deepy.py"), "train.py", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "lacks NumPy, pydantic, PyYAML, torch, deepspeed" in done.stderr
    assert "make install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_it_goes_on_in_the_virtual_environment(tmp_path: Path) -> None:
    copy_project(tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-S", str(tmp_path / "deepy.py"), "train.py", "a b", "--set", "x=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path}/deepy.py|train.py|a b|--set|x=1|"
    # An environment that lacks them as well is not tried for ever.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "make install" in done.stderr


def test_it_is_a_program() -> None:
    assert os.access(ROOT / "deepy.py", os.X_OK)
    first = (ROOT / "deepy.py").read_text(encoding="utf-8").splitlines()[0]
    assert first == "#!/usr/bin/env python3"


def test_a_program_that_is_not_there_is_named() -> None:
    done = run("trian.py", *CONFIG, "--dry-run")
    assert done.returncode == 2
    assert done.stderr == (
        "error: there is no program 'trian.py' to run; did you mean 'train.py'?\n"
    )


def test_dry_run_prints_the_command_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, deepy; code = deepy.main(sys.argv[1:]); "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules), 'imported'; "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--dry-run", "train.py", *CONFIG],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "deepspeed.launcher.launch" in done.stdout
    assert f"{ROOT}/train.py --resolved-config " in done.stdout
    assert os.listdir(tmp_path) == []


def test_print_config_can_be_read_again(tmp_path: Path) -> None:
    first = run("--print-config", "train.py", *CONFIG, "--set", "train_iters=77")
    assert first.returncode == 0, first.stderr
    (tmp_path / "again.yml").write_text(first.stdout)
    second = run("train.py", str(tmp_path / "again"), "--print-config")
    assert second.stdout == first.stdout
    assert "77" in first.stdout


def test_a_misspelt_key_exits_2_with_one_message() -> None:
    done = run("train.py", *CONFIG, "--set", "train_itres=77")
    assert done.returncode == 2
    assert "train_iters" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_whole_run_under_deepy(tmp_path: Path) -> None:
    """deepy.py, DeepSpeed's launcher, two ranks, SIGTERM; a second run; no compiler in PATH."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from megatron.launch.command import decode_config\n"
        "assert 'domains' in decode_config(sys.argv[-1])\n"
        f"sys.argv[1:] = ['wait', {str(tmp_path)!r}]\n"
        f"exec(open({str(PROGRAMS / 'rank_program.py')!r}).read())\n"
    )
    runs.make_data(tmp_path / "data")
    content = runs.config(tmp_path / "data", tmp_path / "run", num_gpus=2)
    arguments = [str(program), str(runs.write_config(tmp_path / "train.yml", content))]
    environment = {**os.environ, "PATH": "/nonexistent"}
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "deepy.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "environment.1").exists():
            assert time.monotonic() < end
            assert job.poll() is None
            time.sleep(0.05)
        second = run(*arguments)
        assert second.returncode == 2
        assert f"process {job.pid}" in second.stderr
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 143, err
    assert "rank 0 of 2 says hello" in out
    assert {"saved.0", "saved.1"} <= set(os.listdir(tmp_path))
    assert json.loads((tmp_path / "environment.0").read_text())["WORLD_SIZE"] == "2"
    assert sorted(os.listdir(tmp_path / "run")) == ["logs"]
