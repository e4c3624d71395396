"""A rank killed inside a save: no half checkpoint is ever named, and all ranks load the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relayout, runs, torn
from support.gloo import RankFailedError, run_ranks
from support.pool import RankPools

from megatron.checkpoint.store import CheckpointStore

SAVED, TORN, STEPS = 2, 4, 5
LAYOUTS = {
    "tensor": {"num_gpus": 2, "model_parallel_size": 2},
    "pipe": {"num_gpus": 2, "pipe_parallel_size": 2},
    "data zero 3": {"num_gpus": 2, "zero_optimization": {"stage": 3}},
    "tensor and pipe": {"num_gpus": 4, "model_parallel_size": 2, "pipe_parallel_size": 2},
}


def write(folder: Path, data: Path, layout: str, *, behind: bool = False) -> Path:
    content = runs.config(
        data,
        folder / "run",
        train_iters=STEPS,
        save_interval=SAVED,
        eval_interval=1000,
        keep_last_n_checkpoints=1,
        async_save=behind,
        **LAYOUTS[layout],
    )
    return runs.write_config(folder / "config.yml", content)


def points(rank: int) -> Iterator[str]:
    """Yield where a rank may die: at each of its files in turn, and after them."""
    yield "seal"
    if rank == 0:
        yield "commit"
    yield from map(str, range(100))


def dies(file: Path, ranks: int, victim: int, point: str) -> bool:
    """Train with a victim; return whether it came to the point where it dies."""
    try:
        run_ranks(torn.train_and_die, ranks, file, victim, f"global_step{TORN}", point)
    except RankFailedError as error:
        said = str(error)
    else:
        return False
    assert f"rank {victim} ended with exit code -9" in said, said
    return True


@pytest.mark.parametrize(
    ("layout", "victim", "only", "behind"),
    [
        ("tensor", 1, "1", False),
        ("tensor", 0, "commit", True),
        *(
            pytest.param(layout, victim, None, behind, marks=pytest.mark.slow)
            for behind in (False, True)
            for layout, settings in LAYOUTS.items()
            for victim in range(settings["num_gpus"])  # type: ignore[arg-type]
        ),
    ],
)
def test_one_rank_dies_inside_a_save(
    pools: RankPools,
    tmp_path: Path,
    layout: str,
    victim: int,
    only: str | None,
    behind: bool,
    record_property: Callable[[str, object], None],
) -> None:
    ranks: Any = LAYOUTS[layout]["num_gpus"]
    data, whole, broken = tmp_path / "data", tmp_path / "whole", tmp_path / "broken"
    runs.make_data(data)
    for folder in (whole, broken):
        folder.mkdir()
    undisturbed = write(whole, data, layout)
    assert pools.call(relayout.train, ranks, undisturbed) == [0] * ranks
    file = write(broken, data, layout, behind=behind)
    store = CheckpointStore(broken / "run" / "checkpoints")
    expected = None
    died = 0
    for point in [only] if only is not None else points(victim):
        shutil.rmtree(broken / "run", ignore_errors=True)
        if not dies(file, ranks, victim, point):
            break
        died += 1
        assert (store.directory / "latest").read_text().strip() == f"global_step{SAVED}"
        assert store.verify(store.path(SAVED)) == []
        assert store.temporary_path(TORN).is_dir()
        states = pools.call(relayout.loaded_state, ranks, file)
        assert {state["step"] for state in states} == {SAVED}
        # That copies agree is checked when the state is put together.
        state = relayout.whole_state(states)
        expected = expected or state
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        if point in (only, "seal"):
            assert pools.call(relayout.train, ranks, file) == [0] * ranks
            runs.assert_same_run(whole / "run", broken / "run", STEPS)
    record_property("trials", died)
    assert died >= (1 if only is not None else 3 + (victim == 0))
