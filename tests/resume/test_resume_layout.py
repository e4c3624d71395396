"""A run goes on in another layout: the same state to the bit, the same samples, the same losses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from support import relayout, runs
from support.cells import Cell
from support.pool import RankPools

STOP, STEPS = 8, 28


LLAMA = {
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "intermediate_size": 48,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "no_weight_tying": True,
    "mixing": {"method": "exp3", "lag": 1, "update_every": 3},
}
MODELS: dict[str, dict[str, Any]] = {
    "neox": {},
    "gated": {"activation": "geglu", "intermediate_size": 48},
    "llama": LLAMA,
    "bf16": {**LLAMA, "precision": "bfloat16"},
    # Most of it is frozen, and has no state of the optimizer.
    "lora": {"lora": {"rank": 2, "targets": ["query_key_value", "dense_4h_to_h"]}},
    "prompt": {"soft_prompt_tuning": {"enabled": True, "n_tokens": 3}},
    "llama lora": {**LLAMA, "lora": {"rank": 2}},
    # A tensor rank's part of the padded vocabulary is as large as the whole is unpadded.
    "padding": {"vocab_size": 128, "make_vocab_size_divisible_by": 128},
    # What belongs to all blocks, and lives beside the embedding.
    "learned": {"pos_emb": "learned", "max_position_embeddings": 24},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "num_attention_heads": 4},
    # Embedding and output weigh more than all blocks, and are on different stages.
    "wide": {
        "num_layers": 3,
        "vocab_size": 2000,
        "no_weight_tying": True,
        "pipe_partition_method": "parameters",
    },
}


class Relayout(NamedTuple):
    """A change of layout halfway through a run."""

    model: str
    before: Cell
    after: Cell
    changes: Mapping[str, Any] = MappingProxyType({})
    slow: bool = True


def offloaded(stage: int) -> dict[str, Any]:
    """Return what keeps the optimizer's state in the host's memory."""
    return {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}


CASES = (
    Relayout("neox", Cell(2, 1, 1, 1), Cell(1, 2, 1, 1), slow=False),
    Relayout("llama", Cell(1, 1, 2, 3), Cell(2, 1, 1, 1), slow=False),
    Relayout("learned", Cell(1, 1, 2, 3), Cell(2, 1, 1, 1)),
    Relayout("learned", Cell(1, 2, 1, 1), Cell(1, 1, 2, 3)),
    Relayout("rpe", Cell(1, 1, 2, 3), Cell(2, 1, 1, 1)),
    Relayout("rpe", Cell(2, 1, 1, 1), Cell(1, 1, 2, 3)),
    Relayout("rpe", Cell(1, 2, 1, 1), Cell(1, 1, 2, 3)),
    Relayout("lora", Cell(2, 1, 1, 1), Cell(1, 2, 1, 1), slow=False),
    Relayout("lora", Cell(1, 2, 1, 1), Cell(1, 1, 2, 2)),
    Relayout("prompt", Cell(2, 1, 1, 1), Cell(1, 1, 2, 2)),
    Relayout("llama lora", Cell(1, 2, 1, 1), Cell(2, 1, 1, 2)),
    Relayout("llama lora", Cell(2, 1, 1, 2), Cell(1, 1, 1, 1)),
    Relayout("neox", Cell(1, 1, 1, 1), Cell(1, 1, 2, 2)),
    Relayout("neox", Cell(1, 1, 2, 1), Cell(1, 1, 4, 1)),
    Relayout("neox", Cell(1, 1, 4, 2), Cell(1, 1, 1, 1)),
    Relayout("neox", Cell(1, 1, 2, 3), Cell(1, 1, 1, 3)),
    Relayout("neox", Cell(1, 1, 2, 1), Cell(1, 1, 4, 3)),
    Relayout("neox", Cell(1, 1, 1, 1), Cell(2, 1, 1, 1)),
    Relayout("neox", Cell(1, 2, 1, 1), Cell(1, 1, 1, 1)),
    Relayout("neox", Cell(1, 1, 1, 1), Cell(1, 2, 1, 1)),
    Relayout("neox", Cell(2, 2, 1, 1), Cell(1, 1, 4, 1)),
    Relayout("neox", Cell(1, 1, 4, 2), Cell(2, 2, 1, 1)),
    Relayout("neox", Cell(2, 1, 2, 3), Cell(1, 2, 2, 1)),
    Relayout("gated", Cell(2, 1, 1, 1), Cell(1, 1, 2, 1)),
    Relayout("llama", Cell(2, 1, 1, 2), Cell(1, 1, 2, 3)),
    Relayout("llama", Cell(2, 1, 1, 3), Cell(1, 2, 1, 1)),
    Relayout("llama", Cell(2, 2, 1, 1), Cell(2, 1, 2, 3)),
    Relayout("llama", Cell(1, 2, 1, 1), Cell(2, 1, 1, 1), {"train_micro_batch_size_per_gpu": 4}),
    Relayout("neox", Cell(1, 1, 2, 1), Cell(2, 1, 1, 2), offloaded(2)),
    Relayout("neox", Cell(2, 1, 1, 1), Cell(1, 1, 2, 3), offloaded(3)),
    Relayout("bf16", Cell(2, 1, 1, 1), Cell(1, 1, 2, 3)),
    Relayout("bf16", Cell(1, 1, 2, 1), Cell(1, 2, 1, 1)),
    Relayout("padding", Cell(1, 1, 2, 1), Cell(2, 1, 1, 1)),
    Relayout("padding", Cell(2, 1, 1, 1), Cell(1, 1, 1, 3)),
    Relayout("wide", Cell(1, 3, 1, 1), Cell(1, 1, 2, 1)),
    Relayout("wide", Cell(1, 1, 2, 1), Cell(1, 3, 1, 1)),
)


def write(folder: Path, data: Path, model: str, cell: Cell, **changes: Any) -> Path:
    base = {
        "num_gpus": cell.ranks,
        "model_parallel_size": cell.tensor,
        "pipe_parallel_size": cell.pipe,
        "zero_optimization": {"stage": cell.stage},
        "train_iters": STEPS,
        "save_interval": STOP,
        "keep_last_n_checkpoints": 9,
        "eval_interval": 1000,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "make_vocab_size_divisible_by": 16,
    }
    content = runs.config(data, folder / "run", **{**base, **MODELS[model], **changes})
    return runs.write_config(folder / "config.yml", content)


class References:
    """Runs that nobody disturbed, and the state that each had at the stop."""

    def __init__(self, folder: Path, pools: RankPools) -> None:
        self.folder, self.pools, self.data = folder, pools, folder / "data"
        runs.make_data(self.data)
        self._done: dict[tuple[str, Cell], tuple[Path, list[dict[str, Any]]]] = {}

    def run(self, model: str, cell: Cell) -> tuple[Path, list[dict[str, Any]]]:
        """Return the run's folder and its ranks' states at the stop."""
        if (model, cell) not in self._done:
            folder = self.folder / f"{model}-{cell}"
            folder.mkdir()
            file = write(folder, self.data, model, cell)
            assert self.pools.call(relayout.train, cell.ranks, file) == [0] * cell.ranks
            stopped = self.folder / f"{model}-{cell}-stopped"
            stopped.mkdir()
            self.stop(folder / "run", stopped / "run")
            file = write(stopped, self.data, model, cell)
            states = self.pools.call(relayout.loaded_state, cell.ranks, file)
            self._done[model, cell] = folder / "run", states
        return self._done[model, cell]

    @staticmethod
    def stop(whole: Path, run: Path) -> None:
        """Copy a run as it was when it had been stopped."""
        shutil.copytree(whole, run)
        for folder in (run / "checkpoints").glob("global_step*"):
            if folder.name != f"global_step{STOP}":
                shutil.rmtree(folder)
        (run / "checkpoints" / "latest").write_text(f"global_step{STOP}\n")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> References:
    return References(tmp_path_factory.mktemp("layouts"), pools)


def difference(one: Path, other: Path) -> list[float]:
    """Return the largest relative difference of a domain's loss at each step."""
    pairs = zip(runs.records(one, "mixture"), runs.records(other, "mixture"), strict=True)
    return [
        max(
            abs(a - b) / abs(a)
            for a, b in zip(
                first["domain_loss"].values(), second["domain_loss"].values(), strict=True
            )
            if a is not None and b is not None
        )
        for first, second in pairs
    ]


def assert_same_state(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Check weights and moments, put together from all ranks, and all that is not of a layout."""
    old, new = relayout.whole_state(before), relayout.whole_state(after)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.equal(value, new[name]), name
    assert any(value.any() for name, value in old.items() if name.endswith("exp_avg_sq"))
    for rank in after:
        assert rank["step"] == STOP
        assert rank["steps"] == {float(STOP)}
        assert rank["planner"] == before[0]["planner"]
        assert rank["guard"] == before[0]["guard"]
        # What the model computes with is what the optimizer holds, to the model's precision.
        for name, value in rank["module"].items():
            held = rank["tensors"][name]["fp32"][0]
            assert torch.equal(value, held.to(rank["dtype"]).float()), name


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case.slow else []) for case in CASES],
    ids=lambda case: f"{case.model}-{case.before}-{case.after}",
)
def test_a_run_changes_its_layout(
    references: References, pools: RankPools, tmp_path: Path, case: Relayout
) -> None:
    whole, states = references.run(case.model, case.before)
    references.stop(whole, tmp_path / "run")
    file = write(tmp_path, references.data, case.model, case.after, **case.changes)
    after = pools.call(relayout.loaded_state, case.after.ranks, file)
    assert_same_state(states, after)
    assert pools.call(relayout.train, case.after.ranks, file) == [0] * case.after.ranks

    run = tmp_path / "run"
    assert runs.records(whole, "samples") == runs.records(run, "samples")
    worst = difference(whole, run)
    print(f"worst: next {worst[STOP]:.1e}, next 20 {max(worst[STOP:]):.1e}")
    at_once, later = (1e-3, 2e-3) if case.model == "bf16" else (1e-6, 1e-5)
    assert max(worst[:STOP]) == 0
    assert worst[STOP] < at_once
    assert max(worst[STOP:]) < later


@pytest.mark.slow
def test_a_run_changes_its_precision(
    references: References, pools: RankPools, tmp_path: Path
) -> None:
    whole, states = references.run("neox", Cell(1, 1, 2, 1))
    references.stop(whole, tmp_path / "run")
    after = Cell(1, 1, 2, 2)
    file = write(tmp_path, references.data, "neox", after, precision="bfloat16")
    assert_same_state(states, pools.call(relayout.loaded_state, 2, file))
    assert pools.call(relayout.train, 2, file) == [0, 0]


@pytest.mark.parametrize(
    "after",
    [Cell(1, 1, 2, 3), pytest.param(Cell(1, 2, 1, 1), marks=pytest.mark.slow)],
    ids=str,
)
def test_weights_alone_from_another_layout(
    references: References, pools: RankPools, tmp_path: Path, after: Cell
) -> None:
    whole, _ = references.run("neox", Cell(2, 1, 1, 1))
    source = str(whole / "checkpoints")
    changes = {"load": source, "finetune": True, "train_iters": 2}
    file = write(tmp_path, references.data, "neox", after, **changes)
    assert pools.call(relayout.train, after.ranks, file) == [0] * after.ranks
    before = [r for r in runs.records(whole, "metrics") if "valid_loss" in r][-1]["valid_loss"]
    first = runs.records(tmp_path / "run", "metrics")[0]
    assert first["step"] == 0
    for name, loss in before.items():
        assert first["valid_loss"][name] == pytest.approx(loss, rel=1e-6)
    # The data begins anew as well, and so does the optimizer.
    assert runs.records(tmp_path / "run", "samples") == runs.records(whole, "samples")[:2]


def test_a_converted_checkpoint_starts_a_run(
    references: References, pools: RankPools, tmp_path: Path
) -> None:
    """By the tool and ``load_universal``, as a user would; data and mixing go on."""
    whole, _ = references.run("neox", Cell(2, 1, 1, 1))
    output = tmp_path / "universal"
    options = ["--input", str(whole), "--step", str(STOP)]
    done = runs.tool("convert_checkpoint.py", *options, "--output", str(output))
    assert done.returncode == 0, done.stderr
    told = runs.tool("convert_checkpoint.py", "--input", str(output), "--info")
    for part in ("step 8", "tensor 2 × pipeline 1 × data 1", "walk, drift, noise", "parameters"):
        assert part in told.stdout

    after = Cell(1, 1, 2, 1)
    plain = write(tmp_path, references.data, "neox", after, load=str(output))
    refused = runs.run("--check", "train.py", plain)
    assert refused.returncode == 2
    assert "load_universal: true" in refused.stderr
    changes = {"load": str(output), "load_universal": True}
    file = write(tmp_path, references.data, "neox", after, **changes)
    checked = runs.run("--check", "train.py", file)
    assert f"goes on after step {STOP} from {output}" in checked.stdout
    assert pools.call(relayout.train, 2, file) == [0, 0]
    samples = runs.records(whole, "samples")[STOP:]
    assert runs.records(tmp_path / "run", "samples") == samples
    new = runs.records(tmp_path / "run", "mixture")
    for one, other in zip(runs.records(whole, "mixture")[STOP:], new, strict=True):
        for name, loss in one["domain_loss"].items():
            assert loss is None or other["domain_loss"][name] == pytest.approx(loss, rel=1e-5)

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    references.stop(whole, stopped / "run")
    converts = runs.run("--check", "train.py", write(stopped, references.data, "neox", after))
    assert "converted to this run's layout first" in converts.stdout
