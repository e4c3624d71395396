"""The same run in every layout: equal to a plain PyTorch loop, and on every rank.

What is compared with what: a layout's samples, token counts, losses by domain, gradient norms,
probabilities and validation losses with those of ``support.reference``, which computes them in
one process without neomix; initial weights with those of one process, to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from support import runs
from support.equality import (
    allowed,
    assert_equal,
    assert_ranks_agree,
    relative,
    train,
    whole,
)
from support.pool import RankPools
from support.scenarios import LOOKED_AT, SCENARIOS, SHAPES, STEPS, Case, Order, Shape


class Cases:
    """Cases by scenario, made when they are first asked for."""

    def __init__(self, folder: Any, **changes: Any) -> None:
        self._folder, self._changes = folder, changes
        self._made: dict[str, Case] = {}

    def __getitem__(self, name: str) -> Case:
        if name not in self._made:
            scenario = SCENARIOS[name]
            replayed = None if scenario.replays is None else self[scenario.replays]
            self._made[name] = Case(scenario, self._folder, replayed, **self._changes)
        return self._made[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("equality")
    runs.make_data(folder / "data")
    runs.add_sidecars(folder / "data")
    return folder


@pytest.fixture(scope="module")
def cases(data: Any) -> Cases:
    return Cases(data)


@pytest.fixture(scope="module")
def calm_cases(data: Any) -> Cases:
    """The same with a lower learning rate, under which rounding grows less."""
    params = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-2}
    return Cases(data, optimizer={"type": "Adam", "params": params})


def report(shape: Shape, scenario: str, worst: dict[str, Any]) -> None:
    """Print the worst differences at step 1, up to 10 and up to 50; pytest shows them with -rA."""
    said = "; ".join(
        f"{name} " + "/".join(f"{value:.1e}" for value in by_step.values())
        for name, by_step in worst.items()
    )
    print(f"{shape} {scenario}: {said}")


def check(pools: RankPools, case: Case, shape: Shape, steps: int, **changes: Any) -> None:
    """Train in a layout and hold everything to the reference."""
    looked = tuple(step for step in LOOKED_AT if step <= steps)
    order = replace(case.order, steps=steps, validate=looked, keep=looked)
    results = pools.call(train, shape.world, case.file(shape, **changes), order)
    assert_ranks_agree(results)
    ledger, valid = results[0]["ledger"], results[0]["valid"]
    assert len(ledger) == steps
    worst = assert_equal(ledger, case.records(steps))
    if case.scenario.replays is not None:
        recorded = [record["weights"] for record in case.records(steps)]
        assert [step["weights"] for step in ledger] == recorded[:steps], "replayed inexactly"
    worst["valid"], worst["parameters"] = {}, {}
    cuts = case.cuts(shape.layout)
    for step in looked:
        difference = relative(valid[step], case.valid(step))
        assert difference <= allowed(step), f"validation after step {step}: {difference:.2g}"
        worst["valid"][step] = difference
        weights = whole([result["kept"][step] for result in results], cuts, shape.layout)
        expected = case.weights_after(step)
        assert weights.keys() == expected.keys()
        distance = max(float(np.abs(weights[name] - expected[name]).max()) for name in expected)
        assert distance <= (0.0 if step == 0 else allowed(step)), f"weights after step {step}"
        worst["parameters"][step] = distance
    report(shape, case.scenario.name, worst)


QUICK = [
    (Shape(tensor=2), "odm-apportion"),
    (Shape(tensor=2, zero=2, sequence=True), "odm"),
    (Shape(pipe=2), "odm"),
    (Shape(data=2, zero=2), "schedule"),
    (Shape(data=2, zero=3), "replay"),
    (Shape(tensor=2, pipe=2), "static"),
    (Shape(tensor=2, pipe=2), "held-out"),
    (Shape(data=2, zero=2), "held-out"),
    (Shape(tensor=2, pipe=2), "excess"),
    (Shape(data=2, zero=3), "excess"),
    (Shape(tensor=2, data=2, zero=2), "gradients"),
    (Shape(tensor=2, sequence=True), "gradients"),
]


@pytest.mark.parametrize(("shape", "name"), QUICK, ids=str)
def test_ten_steps_equal_plain_pytorch(
    pools: RankPools, cases: Cases, shape: Shape, name: str
) -> None:
    check(pools, cases[name], shape, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_equal_plain_pytorch(
    pools: RankPools, cases: Cases, shape: Shape, name: str
) -> None:
    if name == "gradients" and (shape.pipe > 1 or shape.zero > 2):
        pytest.skip("refused there: gradients are not whole")
    check(pools, cases[name], shape, STEPS)


# Fewer micro-batches than stages; one block a stage; one head to a rank; what is recomputed where
# it was not, and the other way round; stage 0, which runs as 1.
CORNERS = [
    pytest.param(Shape(pipe=2), "odm", {"train_micro_batch_size_per_gpu": 8}, id="one micro-batch"),
    pytest.param(Shape(pipe=4), "static", {"train_micro_batch_size_per_gpu": 4}, id="two for four"),
    pytest.param(Shape(pipe=4), "odm-apportion", {}, id="four stages"),
    pytest.param(Shape(pipe=4), "odm", {"pipe_partition_method": "uniform"}, id="uniform"),
    pytest.param(Shape(tensor=4), "schedule", {}, id="four tensor ranks"),
    pytest.param(Shape(tensor=4, sequence=True), "static", {}, id="a quarter of the sequence"),
    pytest.param(Shape(data=4, zero=3), "odm-apportion", {}, id="four data ranks"),
    pytest.param(Shape(tensor=2, pipe=2), "odm", {"checkpoint_activations": True}, id="recomputed"),
    pytest.param(
        Shape(data=2, zero=3), "static", {"checkpoint_activations": False}, id="not recomputed"
    ),
    pytest.param(Shape(pipe=2, data=2, zero=0), "schedule", {}, id="ZeRO 0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "name", "changes"), CORNERS)
def test_corners_equal_plain_pytorch(
    pools: RankPools, cases: Cases, shape: Shape, name: str, changes: dict[str, Any]
) -> None:
    check(pools, cases[name], shape, 10, **changes)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (Shape(tensor=2, pipe=2), "odm"),
        *(
            pytest.param(shape, name, marks=pytest.mark.slow)
            for shape, name in zip(SHAPES, cycle(("odm-apportion", "static", "odm")), strict=False)
        ),
    ],
    ids=str,
)
def test_bf16_is_near_fp32(pools: RankPools, calm_cases: Cases, shape: Shape, name: str) -> None:
    """Every layout in bf16 (fp32 master weights) against the fp32 reference, not another bf16 run.

    Losses and probabilities stay within 1e-3.  The gradient's norm does not: a bf16 number has
    8 bits, so a gradient is off by up to 2e-3 wherever it is stored.
    """
    case = calm_cases[name]
    file = case.file(shape, bf16={"enabled": True})
    results = pools.call(train, shape.world, file, replace(case.order, steps=10))
    assert_ranks_agree(results)

    ledger, records = results[0]["ledger"], case.records(10)
    worst = assert_equal(ledger, records, lambda step: 1e-3, ("domain_loss", "weights"))
    worst |= assert_equal(ledger, records, lambda step: 3e-2, ("grad_norm",))
    report(shape, f"{name} bf16", worst)


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (Shape(tensor=2, pipe=2), "odm"),
        *(
            pytest.param(shape, "schedule", marks=pytest.mark.slow)
            for shape in SHAPES
            if shape.world == 8 or (shape.world <= 2 and shape.tensor == 2)
        ),
    ],
    ids=str,
)
def test_dropout_is_the_same_again(pools: RankPools, cases: Cases, shape: Shape, name: str) -> None:
    """Two runs have the same bits, recomputed or not, with or without validations between."""
    case = cases[name]

    def run(order: Order, **changes: Any) -> list[dict[str, Any]]:
        results = pools.call(train, shape.world, case.file(shape, **DROPOUT, **changes), order)
        assert_ranks_agree(results)
        return results

    plain = run(Order(steps=5, keep=(5,)))
    disturbed = run(
        Order(steps=5, keep=(5,), validate=(2, 3)),
        checkpoint_activations=True,
        checkpoint_num_layers=2,
    )
    for one, other in zip(plain, disturbed, strict=True):
        assert one["ledger"] == other["ledger"]
        assert one["state"] == other["state"]
        assert one["kept"].keys() == other["kept"].keys()
        for key, value in one["kept"][5].items():
            assert np.array_equal(value, other["kept"][5][key]), key
    # Tensor ranks drop the same of what they hold alike, or else whole() would object.
    cuts = case.cuts(shape.layout)
    whole([result["kept"][5] for result in plain], cuts, shape.layout)
    dropped = plain[0]["ledger"][0]["domain_loss"]
    assert relative(dropped, case.records(1)[0]["domain_loss"]) > 1e-3, "dropout was off"
