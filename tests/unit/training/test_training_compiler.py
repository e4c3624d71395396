"""The compiler that torch.compile needs is tried before anything is opened."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import runs

from megatron.errors import ConfigError
from megatron.training.compiler import check_compiler

GXX = shutil.which("g++")


def tool(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)
    return str(file)


@pytest.mark.skipif(GXX is None, reason="no C++ compiler here")
def test_a_compiler_that_works_is_taken(monkeypatch: Any) -> None:
    monkeypatch.delenv("CXX", raising=False)
    check_compiler(on_cpu=True)
    monkeypatch.setenv("CXX", f"{GXX} -O0")
    check_compiler(on_cpu=True)


def test_no_compiler_is_said_with_the_remedy(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError) as caught:
        check_compiler(on_cpu=True)
    for part in ("torch_compile", "g++", "CXX", "torch_compile: false"):
        assert part in str(caught.value)
    monkeypatch.setenv("CXX", "nothing-of-that-name")
    with pytest.raises(ConfigError, match="CXX is nothing-of-that-name"):
        check_compiler(on_cpu=True)


def test_a_compiler_without_headers_is_told_apart(monkeypatch: Any, tmp_path: Path) -> None:
    complaint = "echo 'probe.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1"
    monkeypatch.setenv("CXX", tool(tmp_path, "c++", complaint))
    with pytest.raises(ConfigError) as caught:
        check_compiler(on_cpu=True)
    for part in ("Python.h: No such file", "python3-dev", "OpenMP"):
        assert part in str(caught.value)


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="package triton"):
        check_compiler(on_cpu=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match=r"C compiler.*gcc or clang.*CC"):
        check_compiler(on_cpu=False)
    monkeypatch.setenv("CC", tool(tmp_path, "cc", "exit 0"))
    check_compiler(on_cpu=False)


def test_a_check_of_a_run_ends_with_code_2_before_data_are_opened(tmp_path: Path) -> None:
    """The data do not exist either; the compiler is asked for first."""
    content = runs.config(tmp_path, tmp_path / "run", torch_compile=True, num_gpus=1)
    file = runs.write_config(tmp_path / "run.yml", content)
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, str(root / "deepy.py"), "train.py", str(file), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=root,
    )
    assert ended.returncode == 2, ended.stderr
    assert "torch_compile needs a C++ compiler" in ended.stderr
    assert "Traceback" not in ended.stderr
