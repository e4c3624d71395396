"""Averages over domains, and what was measured of checkpoints, on the report's page."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.report_runs import DOMAINS, NATURAL, evaluated, write_run

from megatron.monitor.jsonl import EVALUATIONS, tasks_line
from megatron.monitor.record import TaskRecord
from megatron.monitor.report import write_report
from megatron.monitor.report.load import load_runs

STEPS = (20, 40, 60)


def section(page: str, name: str) -> str:
    """Return the words of a section of the page."""
    (found,) = re.findall(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", found).split())


def test_averages_and_checkpoints_are_on_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    plain = write_report([folder]).read_text(encoding="utf-8")
    assert 'id="checkpoints"' not in plain
    (run,) = load_runs([folder])
    losses = np.array([run.validations[-1].loss[name] for name in DOMAINS])
    expected = {
        "avg_lm_loss": losses.mean(),
        "avg_ppl": np.exp(losses).mean(),
        "weighted_avg_lm_loss": losses @ NATURAL,
        "weighted_avg_ppl": np.exp(losses) @ NATURAL,
    }
    assert run.validations[-1].averages == pytest.approx(expected)
    shown = section(plain, "averages")
    assert all(f"{value:.4f}" in shown for value in expected.values())
    assert f"{run.validations[0].averages['weighted_avg_ppl']:.4f}" in shown

    lines = [evaluated(step) for step in STEPS]
    lines += [evaluated(60, shots=5), evaluated(20, "test")]
    (folder / EVALUATIONS).write_text("".join(lines), encoding="utf-8")
    page = write_report([folder]).read_text(encoding="utf-8")
    table = section(page, "checkpoints")
    for step in STEPS:
        assert f"step {step}, validation" in table
        first = 5 - step / 40
        assert f"{math.exp(first + 1):.4g} {first + 1:.4f}" in table
        assert f"{first + 1:.4f}" in table
        weighted = sum(p * math.exp(first + k) for k, p in enumerate(NATURAL))
        assert f"{weighted:.4f}" in table
    assert table.count("step 20, test") == 1
    tasks = section(page, "tasks")
    assert "quiz acc 0.52 0.54 0.56" in tasks
    assert "quiz (5-shot) acc – – 1.06" in tasks


def test_examples_are_told_only_where_there_are_any() -> None:
    tasks = {"quiz": {"acc": 0.5}}
    assert "num_fewshot" not in tasks_line(TaskRecord(step=1, tasks=tasks))
    assert '"num_fewshot":{"quiz":2}' in tasks_line(
        TaskRecord(step=1, tasks=tasks, num_fewshot={"quiz": 2})
    ).replace(" ", "")
