"""Reference models, their loss stores, and what each gives the steps of a run; inside a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support import runs
from support.training import Harness

import megatron.mixing  # noqa: F401
from megatron.config import load_config
from megatron.data.plan import Plan
from megatron.engine.runtime import start_runtime
from megatron.launch.stop import StopFlag
from megatron.training.reference_options import open_for_scoring
from megatron.training.scoring import ScoreRequest, score

# Of another size than the runs that use it, with losses that differ from token to token.
REFERENCE = {
    "num_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "init_method_std": 0.2,
    "train_iters": 6,
    "save_interval": 3,
    "eval_interval": 100,
    "mixing": {"method": "static"},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}},
}
PROXY = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "num_layers": 2, "train_iters": 40}


def write(folder: Path, name: str, run: str, **changes: Any) -> Path:
    """Write the configuration of a run on the data in ``folder``."""
    content = runs.config(folder / "data", folder / run, **changes)
    return runs.write_config(folder / f"{name}.yml", content)


def scored(
    rank: int, world: int, file: Path, request: ScoreRequest, stopped: bool = False
) -> tuple[int, list[str]]:
    """Score a run's data on every rank of a pool; return the exit code and what was said.

    Args:
        rank: of the pool.
        world: its size.
        file: the run's configuration.
        request: what to score.
        stopped: whether this rank was asked to stop before it began.
    """
    runtime = start_runtime(deterministic=True)
    config, domains = open_for_scoring(load_config([str(file)]), world_size=world, gpus=0)
    stop = StopFlag()
    if stopped and rank == 0:
        stop.request()
    said: list[str] = []
    try:
        return score(config, domains, runtime, stop, request, said.append), said
    finally:
        domains.close()


def references(rank: int, world: int, files: dict[str, Path], steps: int) -> dict[str, Any]:
    """Return each run's reference losses of its first steps, as this rank is given them.

    Returns:
        By name of the run: by slot of the global batches, in order, the losses [S]; and the
        tokens that were run.
    """
    found = {}
    for name, file in files.items():
        harness = Harness(file)
        parts = harness.parts
        topology, source = parts.topology, parts.reference
        assert source is not None
        rows: dict[int, list[float]] = {}
        total = 0
        for step in range(1, steps + 1):
            planned = parts.planner.take(step)
            assert planned is not None
            slots = _slots(planned.plan, parts)
            # Asked for twice, as a step is that is measured before it trains.
            for _ in range(2):
                batches = list(parts.reader.read(planned))
            for micro, batch in enumerate(batches):
                if not topology.is_last_stage:
                    continue
                losses = np.asarray(batch.reference)
                assert losses.dtype == np.float32
                for slot, row in zip(slots[micro].tolist(), losses.tolist(), strict=True):
                    rows[total + slot] = row
            total += planned.plan.domain.size
        harness.close()
        found[name] = {"rows": rows, "tokens": source.tokens, "identity": source.identity}
    return found


def _slots(plan: Plan, parts: Any) -> np.ndarray:
    loader = parts.loader
    return plan.slots(loader.micro_batch, loader.accumulation, loader.data_rank, loader.data_size)


def gathered(results: list[dict[str, Any]], name: str) -> np.ndarray:
    """Return a run's reference losses of all slots [n, S], checking that copies agree."""
    rows: dict[int, list[float]] = {}
    for result in results:
        for slot, row in result[name]["rows"].items():
            assert rows.setdefault(slot, row) == row, "tensor ranks disagree"
    return np.array([rows[slot] for slot in sorted(rows)], dtype=np.float32)


def proxies(rank: int, world: int, files: dict[str, Path], steps: int) -> dict[str, Any]:
    """Train every run for some steps; return what its mixer made of them."""
    found = {}
    for name, file in files.items():
        harness = Harness(file)
        harness.run(steps)
        result = harness.parts.planner.result()
        assert result is not None
        found[name] = {
            "mean": result.tolist(),
            "weights": list(harness.parts.planner.describe()["domain_weights"].values()),
            "ledger": harness.ledger,
            "state": harness.parts.planner.state_dict(),
        }
        harness.close()
    return found
