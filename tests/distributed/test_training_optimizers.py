"""Optimizers in every layout: the same losses, exact resuming, conversion, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import runs
from support.equality import relative
from support.optimizers import convert, expected_statistics, train_and_save, train_on
from support.pool import RankPools

from megatron.config import load_config
from megatron.training.compatible import optimizer_state

STEPS, AT = 4, 2
KINDS: dict[str, dict[str, Any]] = {
    "Lion": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "madgrad_wd": {"lr": 3e-3},
    "SM3": {"lr": 0.03, "momentum": 0.5},
}
ONE: dict[str, Any] = {"num_gpus": 1}
ZERO2: dict[str, Any] = {"num_gpus": 2, "zero_optimization": {"stage": 2}}
TENSOR: dict[str, Any] = {"num_gpus": 2, "model_parallel_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    runs.make_data(folder / "data")
    return folder


def written(folder: Path, name: str, **changes: Any) -> Path:
    still = {"mixing": {"method": "static"}, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    content = runs.config(folder / "data", folder / name, **{**still, **changes})
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def same(one: dict[str, Any], other: dict[str, Any], bound: float) -> None:
    for a, b in zip(one["losses"], other["losses"], strict=True):
        assert relative(a, b) <= bound
    assert relative(one["norms"], other["norms"]) <= 10 * bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.option("optimizer")
def test_the_same_steps_in_every_layout_and_after_a_resume(
    pools: RankPools, data: Path, kind: str
) -> None:
    optimizer = {"type": kind, "params": {**KINDS[kind], "weight_decay": 0.1}}
    if kind == "SM3":
        del optimizer["params"]["weight_decay"]
    files = {
        name: written(data, f"{kind}-{name}", optimizer=optimizer, **shape)
        for name, shape in (("one", ONE), ("zero2", ZERO2), ("tensor", TENSOR))
    }
    saved = data / f"saved-{kind}"
    alone = pools.call(train_and_save, 1, files["one"], STEPS, None, 0)[0]
    whole = pools.call(train_and_save, 2, files["zero2"], STEPS, saved, AT)[0]
    cut = pools.call(train_and_save, 2, files["tensor"], STEPS, None, 0)[0]
    assert alone["losses"][0] != alone["losses"][-1]
    same(whole, alone, 2e-5)
    same(cut, alone, 2e-5)
    resumed = pools.call(train_on, 2, files["zero2"], saved, AT, STEPS, False)[0]
    assert resumed["losses"] == whole["losses"][AT:]
    for name, value in whole["parameters"].items():
        assert np.array_equal(resumed["parameters"][name], value), name
    if kind != "SM3":
        convert(saved, optimizer_state(load_config([str(files["one"])]).optimizer))
        fresh = pools.call(train_on, 2, files["zero2"], saved, AT, STEPS, False, True)[0]
        assert fresh["losses"][0] == whole["losses"][AT]
        assert fresh["losses"][1] != whole["losses"][AT + 1]
        for ranks, name in ((1, "one"), (2, "tensor")):
            elsewhere = pools.call(train_on, ranks, files[name], saved, AT, STEPS, True)[0]
            same(elsewhere, {key: value[AT:] for key, value in whole.items() if key in (
                "losses", "norms")}, 2e-5)  # fmt: skip


LOGGED: dict[str, Any] = {
    "log_grad_norm": True,
    "log_param_norm": True,
    "log_grad_pct_zeros": True,
    "log_optimizer_states": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 1,
    "gradient_clipping": 0.05,
    "log_interval": 2,
    "no_weight_tying": True,
}
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"num_gpus": 2}),
    "zero3": (2, {"num_gpus": 2, "zero_optimization": {"stage": 3}}),
    "tensor": (2, TENSOR),
    "sequence": (2, {**TENSOR, "sequence_parallel": True}),
    "pipe": (2, {"num_gpus": 2, "pipe_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def alone(pools: RankPools, data: Path) -> dict[str, Any]:
    file = written(data, "logged-one", **ONE, **LOGGED)
    measured = pools.call(train_and_save, 1, file, 2, None, 0)[0]
    return {"seen": measured, "expected": pools.call(expected_statistics, 1, file)[0]}


@pytest.mark.option(
    "log_grad_norm", "log_param_norm", "log_grad_pct_zeros", "log_optimizer_states",
    "log_gradient_noise_scale",
)  # fmt: skip
def test_what_is_measured_is_what_torch_says(alone: dict[str, Any]) -> None:
    first, expected = alone["seen"]["statistics"][1], alone["expected"]
    for name, norm in expected["gradient_norms"].items():
        assert first[f"gradient_norms/{name}"] == pytest.approx(norm, rel=1e-4), name
    unclipped = sum(norm**2 for norm in expected["gradient_norms"].values()) ** 0.5
    assert alone["seen"]["norms"][0] == pytest.approx(unclipped, rel=1e-4)
    assert unclipped > 0.05
    small, big, b, total = expected["small"], expected["big"], 2, 8
    assert expected["count"] == 4
    noise = (small - big) / (1 / b - 1 / total)
    signal = (total * big - b * small) / (total - b)
    assert first["noise_scale"] == pytest.approx(noise / signal, rel=1e-3)
    second = alone["seen"]["statistics"][2]
    for name, value in alone["seen"]["parameters"].items():
        norm = np.linalg.norm(value)
        assert second[f"parameter_norms/{name}"] == pytest.approx(norm, rel=1e-5)
        assert second[f"optimizer_state_norms/{name}_exp_avg"] > 0
    zeros = {name: value for name, value in first.items() if name.startswith("pct_grad_zeros/")}
    assert max(zeros.values()) < 100
    # Tokens that the batch does not hold have a gradient of 0 in the embedding, and in it alone.
    assert next(value for name, value in zeros.items() if "embed" in name) > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_measured_does_not_know_the_layout(
    pools: RankPools, data: Path, alone: dict[str, Any], shape: str
) -> None:
    ranks, keys = SHAPES[shape]
    found = pools.call(train_and_save, ranks, written(data, shape, **LOGGED, **keys), 2, None, 0)
    for rank in found:
        for step, expected in alone["seen"]["statistics"].items():
            assert rank["statistics"][step].keys() == expected.keys()
            for name, value in expected.items():
                measured = rank["statistics"][step][name]
                assert measured == pytest.approx(value, rel=2e-3, abs=1e-6), (step, name)
