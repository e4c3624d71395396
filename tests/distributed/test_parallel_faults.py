"""What goes wrong on one tensor rank or stage: every rank does the same about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import runs
from support.pool import RankPools
from support.scenarios import NEOX, VOCABULARY, Shape
from support.training import Harness

from megatron.errors import NeomixError
from megatron.training.agreement import Agreement, DesyncError
from megatron.training.loop import Ending

STEPS, BAD = 6, 3


def write(folder: Path, shape: Shape, **changes: Any) -> Path:
    runs.make_data(folder / "data", documents=60)
    content = runs.config(
        folder / "data",
        folder / "run",
        **{
            "num_layers": 2,
            "vocab_size": VOCABULARY,
            "train_iters": STEPS,
            **NEOX,
            **shape.keys,
            **changes,
        },
    )
    return runs.write_config(folder / "config.yml", content)


class Poisoned(Harness):
    """A harness in which something of one rank is not finite at some steps."""

    def __init__(self, file: Path, what: str, steps: tuple[int, ...], *, here: bool) -> None:
        super().__init__(file)
        self.now = 0
        self.before: dict[int, Any] = {}
        self._take = self.parts.planner.take
        self.parts.planner.take = self._noting  # type: ignore[method-assign]
        if not here:
            return

        def spoil(value: torch.Tensor) -> torch.Tensor:
            return value * float("nan") if self.now in steps else value

        if what == "gradient":
            parameter = next(self.parts.engine.module.parameters())
            parameter.register_hook(spoil)
        else:
            module = self.parts.engine.module
            loss_fn = module.loss_fn
            module.loss_fn = lambda output, labels: loss_fn((spoil(output[0]), output[1]), labels)

    def _noting(self, step: int) -> Any:
        self.now = step
        self.before[step] = (self.parameters(), self.parts.planner._mixer.state_dict())
        return self._take(step)


def poisoned(
    rank: int, world_size: int, file: Path, what: str, steps: tuple[int, ...], at: int
) -> dict[str, Any]:
    harness = Poisoned(file, what, steps, here=rank == at)
    error = None
    try:
        harness.run(STEPS)
    except NeomixError as raised:
        error = (str(raised), raised.exit_code)
    harness.close()
    return {"ledger": harness.ledger, "error": error, "before": harness.before}


# A pipeline's losses are the last stage's, and a gradient that is spoilt there spoils the
# first one's too; spoilt on the first, the others have finite ones.
PLACES = [
    pytest.param(Shape(tensor=2), "gradient", 1, id="tensor rank 1"),
    pytest.param(Shape(pipe=2), "gradient", 0, id="first stage"),
    pytest.param(Shape(pipe=2), "loss", 1, id="loss of the last stage"),
    pytest.param(Shape(tensor=2, pipe=2), "gradient", 1, id="first stage, tensor rank 1"),
    *(
        pytest.param(*place, marks=pytest.mark.slow, id=name)
        for name, place in {
            "tensor rank 0": (Shape(tensor=2), "gradient", 0),
            "tensor rank 1, ZeRO 2": (Shape(tensor=2, data=2, zero=2), "gradient", 3),
            "tensor rank 1, ZeRO 3": (Shape(tensor=2, data=2, zero=3), "gradient", 1),
            "loss of tensor rank 1": (Shape(tensor=2), "loss", 1),
            "last stage": (Shape(pipe=2), "gradient", 1),
            "one data rank's first stage": (Shape(pipe=2, data=2), "gradient", 1),
            "one of eight": (Shape(tensor=2, pipe=2, data=2), "gradient", 2),
        }.items()
    ),
]


@pytest.mark.parametrize(("shape", "what", "at"), PLACES)
def test_one_rank_not_finite_skips_the_step_everywhere(
    pools: RankPools, tmp_path: Path, shape: Shape, what: str, at: int
) -> None:
    file = write(tmp_path, shape, on_nonfinite="skip(2)", mixing={"method": "smoothed_mean"})
    results = pools.call(poisoned, shape.world, file, what, (BAD,), at)
    for result in results:
        assert result["error"] is None
        skipped = [step["skipped"] for step in result["ledger"]]
        assert skipped == [step == BAD for step in range(1, STEPS + 1)]
        (weights, mixture), (after, mixture_after) = (
            result["before"][step] for step in (BAD, BAD + 1)
        )
        assert all(np.array_equal(weights[name], after[name]) for name in weights)
        assert mixture == mixture_after
        moved, mixture_moved = result["before"][BAD + 2]
        assert not any(np.isnan(value).any() for value in moved.values())
        assert not all(np.array_equal(weights[name], moved[name]) for name in weights)
        assert mixture_moved != mixture


@pytest.mark.parametrize(
    ("shape", "what", "at"),
    [
        pytest.param(Shape(tensor=2), "gradient", 1, id="tensor rank 1"),
        pytest.param(Shape(pipe=2), "gradient", 0, id="first stage"),
        pytest.param(Shape(pipe=2), "loss", 1, id="loss", marks=pytest.mark.slow),
    ],
)
def test_stop_ends_every_rank_with_the_same_words(
    pools: RankPools, tmp_path: Path, shape: Shape, what: str, at: int
) -> None:
    results = pools.call(poisoned, shape.world, write(tmp_path, shape), what, (BAD,), at)
    messages = {result["error"] for result in results}
    assert len(messages) == 1
    text, code = messages.pop()
    assert code == 1
    assert f"step {BAD}" in text
    assert f"the {what} is not finite" in text
    assert all(len(result["ledger"]) == BAD - 1 for result in results)


class Compared(Harness):
    """A harness whose ranks compare their states as a run's do; one of them goes astray."""

    astray = False

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Spoil the state where that is wanted, then compare if it is due."""
        if step == BAD and self.astray:
            # So little that it draws the same samples for a long time.
            self.parts.planner._mixer._inner._estimate[0] *= 1 + 1e-12
        Agreement(
            gather=self.runtime.gather,
            state=self.parts.planner.state_dict,
            interval=self.config.training.state_check_interval,
        ).after_step(step)


def compared(rank: int, world_size: int, file: Path, at: int | None) -> dict[str, Any]:
    harness = Compared(file)
    harness.astray = rank == at
    error = None
    try:
        harness.run(STEPS)
    except DesyncError as raised:
        error = (str(raised), raised.exit_code)
    harness.close()
    return {"steps": len(harness.ledger), "error": error}


@pytest.mark.parametrize("interval", [1, 2])
def test_a_rank_astray_is_named_on_every_rank(
    pools: RankPools, tmp_path: Path, interval: int
) -> None:
    shape = Shape(tensor=2, pipe=2)
    file = write(tmp_path, shape, state_check_interval=interval)
    assert all(result["error"] is None for result in pools.call(compared, 4, file, None))
    results = pools.call(compared, 4, file, 2)
    found = -(-BAD // interval) * interval
    assert {result["steps"] for result in results} == {found}
    (message,) = {result["error"] for result in results}
    assert message[1] == 1
    assert f"after step {found}" in message[0]
    assert "rank 2 differs from the rest" in message[0]


def test_of_two_ranks_both_are_named(pools: RankPools, tmp_path: Path) -> None:
    file = write(tmp_path, Shape(pipe=2), state_check_interval=2)
    results = pools.call(compared, 2, file, 1)
    (message,) = {result["error"] for result in results}
    assert "no state has a majority" in message[0]
    assert "rank 0: " in message[0]
    assert "rank 1: " in message[0]
