"""Data options in every layout: the same rows are counted, and the losses are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs
from support.pool import RankPools
from support.training import Harness

from megatron.data.reader import TokenReader
from megatron.data.writer import TokenWriter

STEPS = 6
SEQ = 32
LAYOUTS: list[dict[str, Any]] = [
    {"pipe_parallel_size": 2},
    {"model_parallel_size": 2, "sequence_parallel": True},
    {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}},
]
CURRICULUM = {
    "min_difficulty": 8,
    "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 8},
}
FIM = {
    "fim_rate": 0.9,
    "fim_level": "token",
    "fim_prefix_token": 120,
    "fim_suffix_token": 121,
    "fim_middle_token": 122,
}


def train(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    """Train in one rank; return what it saw, and the held-out losses at the end."""
    harness = Harness(file)
    try:
        harness.run(STEPS)
        held = harness.parts.validation.measure(harness.parts.engine)
        costs = harness.parts.recorder._token_costs
        return {
            "ledger": harness.ledger,
            "valid": held.loss.tolist(),
            "rows": [costs.row_length(step) for step in range(1, STEPS + 1)],
            "batch": harness.parts.loader.counts_tokens,
        }
    finally:
        harness.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    runs.make_data(folder)
    runs.add_sidecars(folder)
    for name in runs.DOMAINS:
        with (
            TokenReader(folder / name) as reader,
            TokenWriter(folder / f"{name}-l", "int32") as out,
        ):
            tokens = reader.read(0, reader.num_tokens).astype(np.int64)
            labels = np.where(tokens % 4 == 1, tokens, -100)
            out.add_many(labels, reader.document_sizes(0, reader.num_documents))
    return folder


def written(data: Path, name: str, **changes: Any) -> Path:
    labelled = changes.pop("labels", False)
    domains = {
        domain: {
            "train": str(data / domain),
            **({"train_labels": str(data / f"{domain}-l")} if labelled else {}),
        }
        for domain in runs.DOMAINS
    }
    content = runs.config(
        data,
        data / "run",
        domains=domains,
        seq_length=SEQ,
        vocab_size=123,
        mixing={"method": "static", "weights": "uniform"},
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **changes,
    )
    content |= {"num_gpus": 1}
    return runs.write_config(data / f"{name}.yml", content)


CASES: dict[str, dict[str, Any]] = {
    "labels": {
        "labels": True,
        "pack_impl": "pack_until_overflow",
        "eod_mask_loss": True,
        "curriculum_learning": CURRICULUM,
    },
    "fim": {**FIM, "pack_impl": "unpacked"},
}


@pytest.mark.parametrize("case", ["labels", pytest.param("fim", marks=pytest.mark.slow)])
def test_a_layout_changes_nothing(data: Path, pools: RankPools, case: str) -> None:
    options = CASES[case]
    (one,) = pools.call(train, 1, written(data, case, **options))
    (plain,) = pools.call(train, 1, written(data, "plain"))
    tokens = np.array([step["tokens"] for step in one["ledger"]]).sum(axis=1)
    everything = np.array([step["tokens"] for step in plain["ledger"]]).sum(axis=1)
    assert (everything == 8 * SEQ).all()
    assert tokens.sum() < everything.sum(), "what is not trained on is not counted"
    assert one["batch"]
    if case == "labels":
        assert one["rows"] == [8, 16, 16, 24, 32, 32]
        assert tokens[0] < 8 * 8
        assert (tokens < [8 * length for length in one["rows"]]).all()
    for number, layout in enumerate(LAYOUTS):
        found = pools.call(train, 2, written(data, f"{case}-{number}", **options, **layout))
        for rank in found:
            for mine, theirs in zip(rank["ledger"], one["ledger"], strict=True):
                assert mine["samples"] == theirs["samples"]
                assert mine["tokens"] == theirs["tokens"]
                assert mine["domain_loss"] == pytest.approx(
                    theirs["domain_loss"], rel=2e-4, nan_ok=True
                )
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
            assert rank["valid"] == pytest.approx(one["valid"], rel=2e-4)
