"""Whole runs inside a pool of ranks, and the state of a run put together from all its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron.mixing  # noqa: F401
from megatron.checkpoint.store import CheckpointStore
from megatron.config import load_config
from megatron.engine.runtime import start_runtime
from megatron.launch.stop import StopFlag
from megatron.parallel.partition import Partition
from megatron.training.build import build
from megatron.training.check import preflight
from megatron.training.layout import run_layout
from megatron.training.restore import find_source, restore
from megatron.training.run import run

Part = tuple[torch.Tensor, Partition | None]
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def train(rank: int, world: int, file: Path) -> int:
    """Train what a configuration file describes; to be called on every rank of a pool."""
    with meeting_point(rank):
        return run(load_config([str(file)]), start_runtime(deterministic=True), StopFlag())


@contextmanager
def meeting_point(rank: int) -> Iterator[None]:
    """Hold a store where ``MASTER_PORT`` says, as a launched job has one; collective."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    port: list[Any] = [store.port]
    dist.broadcast_object_list(port, src=0)
    before, os.environ["MASTER_PORT"] = os.environ["MASTER_PORT"], str(port[0])
    try:
        yield
    finally:
        os.environ["MASTER_PORT"] = before
    dist.barrier()  # rank 0's store outlives the others' use of it


def loaded_state(rank: int, world: int, file: Path) -> dict[str, Any]:
    """Build a run, take up its checkpoint, and return this rank's part of the state.

    Under data parallelism the parts are whole: DeepSpeed gathers them.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    runtime = start_runtime(deterministic=True)
    checked = preflight(load_config([str(file)]), world_size=world, gpus=0)
    config = checked.config
    source = find_source(config, runtime, CheckpointStore(config.checkpoint.save_dir), print)
    assert source is not None
    parts = build(config, runtime, checked.domains, checked.mixer)
    step = restore(checked, runtime, parts, source, print)
    engine: Any = parts.engine._engine
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors: dict[str, dict[str, Part]] = {}
    for name, parameter in engine.module.named_parameters():
        division = parts.engine.partitions[name]
        if not parameter.requires_grad:
            tensors[name] = {"fp32": (parameter.detach().float().cpu().clone(), division)}
            continue
        whole = {"fp32": safe_get_full_fp32_param(parameter)}
        for key in STATES[1:]:
            whole[key] = safe_get_full_optimizer_state(parameter, key)
        with torch.no_grad():
            tensors[name] = {
                key: (value.detach().clone().cpu(), division) for key, value in whole.items()
            }
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values() if state}
    result = {
        "tensors": tensors,
        "steps": steps,
        "step": step,
        "planner": parts.planner.state_dict(),
        "guard": parts.guard.state_dict(),
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in engine.optimizer.optimizer.param_groups
        ],
        "dtype": next(engine.module.parameters()).dtype,
        "module": {
            name: value.detach().float().clone()
            for name, value in engine.module.named_parameters()
            if not hasattr(value, "ds_id")
        },
    }
    parts.sinks.close()
    parts.loader.close()
    checked.domains.close()
    engine.destroy()
    layout = run_layout(config, world)
    return {"tensor": layout.coordinates(rank).tensor, **result}


def whole_state(parts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put the model together from every rank's part, checking that copies agree."""
    ranks = 1 + max(part["tensor"] for part in parts)
    found: dict[tuple[str, str], dict[int, Part]] = {}
    for part in parts:
        for name, states in part["tensors"].items():
            for key, (value, division) in states.items():
                held = found.setdefault((name, key), {})
                if part["tensor"] in held:
                    assert torch.equal(held[part["tensor"]][0], value), (name, key)
                held[part["tensor"]] = (value, division)
    whole = {}
    for (name, key), held in found.items():
        values = [held[tensor][0] for tensor in range(ranks)]
        division = held[0][1]
        if division is None:
            assert all(torch.equal(values[0], other) for other in values), (name, key)
            full = values[0]
        else:
            padded = division.join(values)
            full = division.unpad(padded)
            if padded.shape != full.shape:
                rest = padded.narrow(
                    division.dim,
                    full.shape[division.dim],
                    padded.shape[division.dim] - full.shape[division.dim],
                )
                assert not rest.any(), f"the padding of {name} {key} is not 0"
        whole[f"{name} {key}"] = full
    return whole
