"""Methods whose signals a layout cannot give are refused when the configuration is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import runs

from data_sampling_utils import RunContext, Signal, build_mixer
from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.parallel.layout import Layout
from megatron.training.check import preflight
from megatron.training.signals_fit import asked_ahead, check_signals

GRADIENTS = {Signal.GRADIENT_ALIGNMENT, Signal.LEARNING_RATE}


def fit(
    needs: set[Signal], *, ahead: set[Signal] | None = None, pipe: int = 1, zero: int = 1
) -> None:
    check_signals(
        "a_method",
        needs=needs,
        ahead=needs if ahead is None else ahead,
        layout=Layout(world_size=2 * pipe, tensor_size=2, pipe_size=pipe),
        zero_stage=zero,
    )


@pytest.mark.parametrize("zero", [1, 2])
def test_whole_parameters_give_gradients(zero: int) -> None:
    fit(GRADIENTS, zero=zero)


def test_gradients_are_refused_where_parameters_are_not_whole() -> None:
    with pytest.raises(ConfigError, match=r"'a_method'.*pipe_parallel_size is 2.*set .* to 1"):
        fit(GRADIENTS, pipe=2)
    with pytest.raises(ConfigError, match=r"zero_optimization.stage is 3.*to 2 or lower"):
        fit(GRADIENTS, zero=3)


def test_losses_of_the_step_itself_are_refused_with_stages() -> None:
    losses = {Signal.LOSS, Signal.EXCESS_LOSS}
    fit(losses, zero=3)
    fit(losses, ahead=set(), pipe=2)
    with pytest.raises(ConfigError, match="set loss_lag to 1"):
        fit(losses, pipe=2)


def test_held_out_batches_are_measured_anywhere() -> None:
    needs, ahead = {Signal.LOSS, Signal.BATCH_VALID_LOSS}, {Signal.BATCH_VALID_LOSS}
    fit(needs, ahead=ahead, pipe=2)
    fit(needs, ahead=ahead, zero=3)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("odm", {}, set()),
        ("doge", {}, GRADIENTS),
        ("doge", {"update_every": 10, "pool": False, "warmup_steps": 13}, GRADIENTS),
        ("validation_gap", {"update_every": 7, "pool": False}, {Signal.BATCH_VALID_LOSS}),
        ("doremi", {"reference": "x"}, set()),
        (
            "doremi",
            {"reference": "x", "loss_lag": 0, "update_every": 5, "warmup_steps": 5},
            {Signal.LOSS, Signal.EXCESS_LOSS},
        ),
    ],
)
def test_what_is_asked_ahead_is_found_out_by_asking(
    method: str, options: dict[str, Any], expected: set[Signal]
) -> None:
    mixer = build_mixer(method, domains=["a", "b"], context=RunContext(vocab_size=10), **options)
    common = {"warmup_steps": 0, "update_every": 1} | {
        key: value for key, value in options.items() if key in ("warmup_steps", "update_every")
    }
    assert asked_ahead(mixer, **common) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipe_parallel_size": 2}, "set pipe_parallel_size to 1"),
        ({"zero_optimization": {"stage": 3}}, "set the stage to 2 or lower"),
        (
            {"deepspeed_extra_args": {"zero_optimization": {"stage": 3}}},
            "set the stage to 2 or lower",
        ),
        ({"split": "100,0,0"}, "has no validation data"),
    ],
)
def test_a_run_is_refused_before_it_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    runs.make_data(tmp_path / "data", documents=40)
    content = runs.config(tmp_path / "data", tmp_path / "run", mixing={"method": "doge"}, **changes)
    config = load_config([str(runs.write_config(tmp_path / "run.yml", content))])
    with pytest.raises(ConfigError, match=message):
        preflight(config, world_size=2, gpus=0)


def test_the_form_of_all_domains_needs_no_held_out_data(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data", documents=40)
    mixing = {"method": "doge", "target": "all"}
    content = runs.config(tmp_path / "data", tmp_path / "run", mixing=mixing, split="100,0,0")
    config = load_config([str(runs.write_config(tmp_path / "run.yml", content))])
    checked = preflight(config, world_size=2, gpus=0)
    checked.domains.close()
