"""Targets: named subtasks, from files that say so, folders, and names on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.selection import chat, texts, write_lines

from megatron.errors import DataError
from megatron.selection.targets import TargetSet, open_targets


def shape(found: TargetSet) -> tuple[str, dict[str, int]]:
    return found.name, {target.name: len(target.documents) for target in found.targets}


def test_a_file_is_a_task(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "exam.v2.jsonl", texts(3))
    assert shape(open_targets([str(plain)])) == ("exam", {"exam.v2": 3})
    assert shape(open_targets([f"mmlu={plain}"])) == ("mmlu", {"mmlu": 3})
    (target,) = open_targets([f"mmlu={plain}"]).targets
    assert target.documents[1].text == "word1 word1 "


@pytest.mark.parametrize("key", ["subtask", "task"])
def test_records_name_their_subtasks(tmp_path: Path, key: str) -> None:
    records = [{**chat("q", "a"), key: name} for name in ("algebra", "law", "algebra")]
    path = write_lines(tmp_path / "mmlu.jsonl", records)
    assert shape(open_targets([str(path)])) == ("mmlu", {"algebra": 2, "law": 1})
    assert shape(open_targets([f"exam={path}"])) == ("exam", {"algebra": 2, "law": 1})
    other = write_lines(tmp_path / "bbh.jsonl", texts(1))
    assert shape(open_targets([f"mmlu={path}", f"bbh={other}"])) == (
        "mmlu+bbh",
        {"mmlu/algebra": 2, "mmlu/law": 1, "bbh": 1},
    )


def test_a_folder_is_a_task_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    folder.mkdir()
    for number, name in enumerate(("law", "algebra"), start=1):
        write_lines(folder / f"{name}.jsonl", texts(number))
    assert shape(open_targets([str(folder)])) == ("mmlu", {"algebra": 2, "law": 1})


def test_fingerprints_follow_the_examples(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [chat("a", "b"), chat("c", "d")])
    first = open_targets([f"t={path}"]).fingerprints()
    write_lines(path, [chat("a", "b"), chat("cd", "")])
    assert open_targets([f"t={path}"]).fingerprints() != first
    write_lines(path, [chat("a", "b"), chat("c", "d")])
    assert open_targets([f"t={path}"]).fingerprints() == first


def test_what_cannot_be_a_target_is_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", texts(1))
    with pytest.raises(DataError, match=r"a second subtask 'x'; give one of them another name"):
        open_targets([f"x={path}", f"x={path}"])
    with pytest.raises(DataError, match=r"--target .*no\.jsonl: no such file"):
        open_targets([f"x={tmp_path / 'no.jsonl'}"])
    write_lines(path, [{"question": "?"}])
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: no 'text'.*'question'"):
        open_targets([str(path)])
    assert shape(open_targets([str(path)], field="question")) == ("t", {"t": 1})
