"""Another number of ranks: the same samples, the same losses to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import runs

STEPS, STOP = 16, 8


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and a run of one rank over it, dropout off."""
    folder = tmp_path_factory.mktemp("layouts")
    runs.make_data(folder / "data")
    runs.train(write(folder, folder / "data", ranks=1, stage=1))
    return folder / "data", folder / "run"


def write(folder: Path, data: Path, *, ranks: int, stage: int, stop: int | None = None) -> Path:
    changes = {
        "train_iters": STEPS,
        "num_gpus": ranks,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "zero_optimization": {"stage": stage},
        "save_interval": STEPS,
    }
    if stop is not None:
        changes["exit_interval"] = stop
    content = runs.config(data, folder / "run", **changes)
    return runs.write_config(folder / "config.yml", content)


def worst_difference(one: Path, other: Path) -> float:
    pairs = zip(runs.records(one, "mixture"), runs.records(other, "mixture"), strict=True)
    return max(
        abs(a - b)
        for first, second in pairs
        for a, b in zip(first["domain_loss"].values(), second["domain_loss"].values(), strict=True)
        if a is not None and b is not None
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, 1), (1, 2)),
        pytest.param((1, 2), (2, 1), marks=pytest.mark.slow),
        pytest.param((1, 1), (4, 1), marks=pytest.mark.slow),
        pytest.param((2, 3), (1, 3), marks=pytest.mark.slow),
        pytest.param((1, 3), (2, 3)),
    ],
    ids=lambda layout: f"{layout[0]} ranks ZeRO {layout[1]}",
)
def test_layout_changes_between_two_parts_of_a_run(
    reference: tuple[Path, Path], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    data, whole = reference
    runs.train(write(tmp_path, data, ranks=before[0], stage=before[1], stop=STOP))
    done = runs.train(write(tmp_path, data, ranks=after[0], stage=after[1]))
    assert "universal" in done.stdout
    run = tmp_path / "run"
    assert runs.records(whole, "samples") == runs.records(run, "samples")
    assert worst_difference(whole, run) < 1e-5


def test_zero_3_to_1_is_refused_with_the_remedy(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = reference
    runs.train(write(tmp_path, data, ranks=1, stage=3, stop=STOP))
    refused = runs.run("train.py", write(tmp_path, data, ranks=1, stage=1))
    assert refused.returncode == 2
    assert "zero_optimization.stage to 3" in refused.stderr
    assert "Traceback" not in refused.stderr
