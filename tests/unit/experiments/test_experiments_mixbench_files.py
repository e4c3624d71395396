"""MixBench's study files: each is read, and says of its tasks what is true of the data."""

from __future__ import annotations

import re

import pytest
import yaml
from support.source import ROOT

import megatron.mixing  # noqa: F401  (registers the methods that a study may name)
from megatron.data.corpora.mixbench import CONFIG, FAMILIES, GENERATED, _seed
from megatron.experiments.compare.study_file import read_study_file

FOLDER = ROOT / "configs" / "mixbench"
STUDIES = sorted(path for path in FOLDER.glob("*.yml") if "tasks" in yaml.safe_load(path.open()))
BASES = sorted(set(FOLDER.glob("*.yml")) - set(STUDIES))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_file_is_read(path):
    study = read_study_file(path)
    assert study.name == f"mixbench-{path.stem}"
    for task in study.tasks:
        assert {FOLDER / "base.yml"} < {ROOT / file for file in _files(path, task)}
        assert len(set(task.seeds)) == len(task.seeds) >= 3


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_what_it_says_of_a_task_is_true(path):
    tasks = yaml.safe_load(path.read_text())["tasks"]
    for task in read_study_file(path).tasks:
        (domains,) = [file for file in tasks[task.name]["configs"] if file.endswith(CONFIG)]
        found = re.search(r"data/mixbench/(\w+)-(\d+)/", domains)
        assert found is not None, domains
        family, draw = FAMILIES[found[1]], int(found[2])
        assert draw != 0, "what was tuned was tuned on draw 0"
        assert (task.kind == "room") is family.room
        assert task.entropies.keys() <= set(family.domains) & GENERATED.keys()
        for name, entropy in task.entropies.items():
            known = GENERATED[name](_seed(name, draw)).entropy
            assert entropy == pytest.approx(known, abs=6e-5), name


def test_there_are_studies_and_one_base():
    assert {path.stem for path in STUDIES} >= {"small", "full"}
    assert "base" in {path.stem for path in BASES}


def _files(path, task):
    return [(path.parent / file).resolve() for file in task.base.files]
