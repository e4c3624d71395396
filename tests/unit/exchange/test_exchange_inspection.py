"""What the inspection says of one checkpoint, and of two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchange
from support.exchange import NEOX
from support.source import ROOT

from megatron.errors import CheckpointError
from megatron.exchange.inspection import differences, read_folder


def checkpoint(folder: Path, seed: int) -> Path:
    model = exchange.config(folder, NEOX).model
    exchange.save(folder, NEOX, exchange.random_weights(model, seed), tensor=2)
    return folder / "checkpoints/global_step7"


def inspect(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/inspect_checkpoints.py"), *arguments],
        input=stdin, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_one_checkpoint_and_two(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "one", 0), checkpoint(tmp_path / "two", 1)
    name = "mp_rank_01_model_states.pt/module/1.attention.dense.weight"
    said = inspect(str(one), "--attributes", "1.attention.dense.weight", "iteration")
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert len(lines) == 4
    assert any(line.startswith(f"{name}: float32 [32, 16] mean ") for line in lines)
    assert "mp_rank_00_model_states.pt/iteration: 7" in lines

    typed = inspect(f"{one},{other}", "-i", stdin="print(sorted(content) == sorted(other))\n")
    assert "True" in typed.stdout
    found = list(differences(read_folder(one), read_folder(other), ["module"], values=True))
    assert any(line.startswith(f"! {name}: differ in 512 of 512, by ") for line in found)


def test_differences_of_form_and_of_value(tmp_path: Path) -> None:
    one: dict[str, Any] = {"a": {"x": torch.ones(2), "y": 1}, "b": torch.zeros(3)}
    other = {"a": {"x": torch.tensor([1.0, 1.5]), "y": 2}, "c": 0, "b": torch.zeros(4)}
    form = ["! b: float32 [3] and float32 [4]", "+ c: 0"]
    assert list(differences(one, other, [], values=False)) == form
    assert list(differences(one, other, [], values=True)) == [
        "! a/x: differ in 1 of 2, by 0.5 at most",
        "! a/y: 1 and 2",
        *form,
    ]
    assert not list(differences(one, one, [], values=True))
    with pytest.raises(CheckpointError, match="nothing is called z"):
        list(differences(one, other, ["z"], values=True))
    torch.save({"x": Hostile()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="unpickling it would run"):
        read_folder(tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)
