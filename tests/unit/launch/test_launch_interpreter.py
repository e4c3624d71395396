"""Which Python goes on when the one that was called lacks libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import deepy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Calls of exec, with an environment that is there."""
    made: list[list[str]] = []
    interpreter = tmp_path / "python"
    interpreter.touch()
    monkeypatch.setattr(deepy, "VENV_PYTHON", interpreter)
    monkeypatch.setattr(os, "execv", lambda path, words: made.append(list(words)))
    monkeypatch.setenv(deepy.REEXEC_VARIABLE, "")
    return made


def lacking(monkeypatch: pytest.MonkeyPatch, *, always: list[str], launching: list[str]) -> None:
    def missing(*, launching: bool, names: list[str] = launching) -> list[str]:
        return always + (names if launching else [])

    monkeypatch.setattr(deepy, "missing_modules", missing)


def test_a_python_with_everything_goes_on_itself(
    monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]
) -> None:
    lacking(monkeypatch, always=[], launching=[])
    deepy.ensure_dependencies(["train.py"], launching=True)
    assert not calls


@pytest.mark.parametrize("launching", [True, False])
def test_one_that_could_not_run_it_hands_a_check_over_too(
    monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], launching: bool
) -> None:
    lacking(monkeypatch, always=[], launching=["torch"])
    monkeypatch.setattr(deepy.sys, "exit", lambda code: None)
    deepy.ensure_dependencies(["--check", "train.py"], launching=launching)
    assert calls[0][2:] == ["--check", "train.py"]


def test_without_an_environment_a_check_goes_on_and_a_launch_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    calls: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(deepy, "VENV_PYTHON", tmp_path / "none" / "bin" / "python")
    lacking(monkeypatch, always=[], launching=["torch"])
    deepy.ensure_dependencies(["--check", "train.py"], launching=False)
    with pytest.raises(SystemExit) as end:
        deepy.ensure_dependencies(["train.py"], launching=True)
    assert end.value.code == 2
    assert "make install" in capsys.readouterr().err
    assert not calls
