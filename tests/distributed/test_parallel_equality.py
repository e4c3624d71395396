"""The same run in every layout: equal to a plain PyTorch loop, and on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs
from support.equality import (
    SCENARIOS,
    SHAPES,
    STEPS,
    Case,
    Order,
    Shape,
    allowed,
    assert_equal,
    assert_ranks_agree,
    relative,
    train,
    whole,
)
from support.pool import RankPools


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    started = RankPools()
    yield started
    started.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("equality")
    runs.make_data(folder / "data")
    runs.add_sidecars(folder / "data")
    made: dict[str, Case] = {}
    for name, scenario in SCENARIOS.items():
        made[name] = Case(scenario, folder, made.get(scenario.replays or ""))
    return made


def report(shape: Shape, scenario: str, worst: dict[str, Any]) -> None:
    """Print the worst differences; pytest shows them with -rA."""
    said = "; ".join(
        f"{name} " + "/".join(f"{value:.1e}" for value in by_step.values())
        for name, by_step in worst.items()
    )
    print(f"{shape} {scenario}: {said}")


def check(pools: RankPools, case: Case, shape: Shape, steps: int, **changes: Any) -> None:
    """Train in a layout and hold everything to the reference."""
    order = replace(case.order, steps=steps, validate=(0, steps), keep=(0, steps))
    results = pools.call(train, shape.world, case.file(shape, **changes), order)
    assert_ranks_agree(results)
    ledger, valid = results[0]["ledger"], results[0]["valid"]
    assert len(ledger) == steps
    worst = assert_equal(ledger, case.records)
    for step, losses in valid.items():
        difference = relative(losses, case.valid[step])
        assert difference <= allowed(step), f"validation after step {step}: {difference:.2g}"
        worst[f"valid@{step}"] = {step: difference}
    cuts = case.cuts(shape.layout)
    initial, final = (
        whole([result["kept"][step] for result in results], cuts, shape.layout)
        for step in (0, steps)
    )
    assert initial.keys() == case.weights.keys()
    for name, value in case.weights.items():
        assert np.array_equal(initial[name], value.numpy()), f"{name} starts differently"
        assert final.keys() == initial.keys()
    report(shape, case.scenario.name, worst)


QUICK = [
    (Shape(), "odm"),
    (Shape(tensor=2), "odm-apportion"),
    (Shape(pipe=2), "odm"),
    (Shape(data=2, zero=2), "schedule"),
    (Shape(data=2, zero=3), "replay"),
    (Shape(tensor=2, pipe=2, data=1), "static"),
]


@pytest.mark.parametrize(("shape", "name"), QUICK, ids=str)
def test_ten_steps_equal_plain_pytorch(
    pools: RankPools, cases: dict[str, Case], shape: Shape, name: str
) -> None:
    check(pools, cases[name], shape, 10)
