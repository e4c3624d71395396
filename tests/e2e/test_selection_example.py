"""The worked example of the page on choosing documents, run as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.doc_commands import commands
from support.selection import read_lines
from support.tiny_project import environment, make_project

import deepy
from megatron.data.reader import TokenReader
from megatron.errors import run_command
from megatron.selection.table import ScoreTable
from tools import select_data

PAGE = Path("docs/selection.md")


def needs_no_model(words: list[str]) -> bool:
    """Tell whether a command works on the project as it is, before anything was trained."""
    if words[2] == "score":
        return words[words.index("--method") + 1] in ("bm25", "random")
    return words[2] == "merge" or any("bm25.parquet" in word for word in words)


def test_the_example_chooses_documents_and_a_run_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = make_project(tmp_path)
    monkeypatch.chdir(root)
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    ran = []
    for command in commands(PAGE):
        words = list(command.words)
        if words[0] == "./deepy.py" and "notes-train" in command.text:
            code = deepy.main(words[1:])
        elif words[1:2] == ["tools/select_data.py"] and needs_no_model(words):
            code = run_command(lambda words=words: select_data.main(words[2:]))
        else:
            continue
        shown = capsys.readouterr()
        assert code == 0, f"{command}\n{shown.out}{shown.err}"
        ran.append(words[2])
    assert ran[:3] == ["score", "select", "train.py"]
    assert ran.count("score") == 3
    assert "merge" in ran

    table = ScoreTable("runs/selection/bm25.parquet")
    assert table.facts.subtasks == ("notes",)
    assert len(table) == 3 * 400
    best = Path("runs/selection/chosen/notes-train-p0.2-bm25.jsonl")
    chosen = read_lines(best)
    assert len(chosen) == 240
    scores = [one["score"] for one in chosen]
    assert scores == sorted(scores, reverse=True)
    fragment = yaml.safe_load(best.with_suffix(".yml").read_text())
    (block,) = fragment["domains"].values()
    with TokenReader(block["train"]) as reader:
        assert reader.num_documents == 240
    state = json.loads(Path(str(best)[: -len(".jsonl")] + ".selection.json").read_text())
    assert state["state"] == "done"
    assert len(ScoreTable("runs/selection/random.parquet")) == 800
