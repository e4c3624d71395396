"""Held-out losses of a batch mixed like the step's own, and losses of a step before it trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import runs
from support.pool import RankPools
from support.scenarios import Shape
from support.training import Harness

from megatron.config import load_config
from megatron.data.plan import Plan
from megatron.data.rows import RowReader
from megatron.model.gpt import GPT
from megatron.signals.foresight import BatchLosses
from megatron.signals.held_out_batch import HeldOutBatch
from megatron.signals.ledger import Ledger
from megatron.training.check import preflight

BATCH, LENGTH, VOCABULARY = 8, 16, 120
DOMAIN = [0, 2, 0, 0, 2, 0, 0, 2]
SEEN = [1003, 7, 40]
"""Samples drawn so far, this step's included: the first domain's windows have come round."""


def planned() -> Any:
    plan = Plan(
        step=9,
        domain=np.array(DOMAIN, dtype=np.int32),
        epoch=np.zeros(BATCH, dtype=np.int64),
        sample=np.arange(BATCH, dtype=np.int64) + 30,
        weights=np.array([0.6, 0.1, 0.3]),
    )
    decision = SimpleNamespace(loss_weights=np.array([1.0, 2.0, 3.0]))
    return SimpleNamespace(plan=plan, step=9, samples_seen=np.array(SEEN), decision=decision)


def measure(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    harness = Harness(file)
    try:
        parts, config = harness.parts, harness.config
        loss_fn: Any = getattr(parts.engine.module, "loss_fn", None)
        observer, device = loss_fn.observe, harness.runtime.device
        contributes = parts.topology.is_last_stage and parts.topology.tensor_rank == 0

        def ledger() -> Ledger:
            return Ledger(3, device, contributes=contributes)

        common: dict[str, Any] = {
            "evaluator": parts.engine,
            "observer": observer,
            "accumulation": parts.loader.accumulation,
            "device": device,
        }
        held_out = HeldOutBatch(
            topology=parts.topology,
            ledger=ledger(),
            held_out=RowReader(
                harness.domains.valid[:3],
                seq_length=LENGTH,
                rows=parts.loader.micro_batch,
                masked_token=runs.EOD if config.training.eod_mask_loss else None,
                vocab_size=VOCABULARY,
            ),
            micro_batch=parts.loader.micro_batch,
            **common,
        )
        losses = BatchLosses(ledger=ledger(), read=parts.reader.read, **common)
        found = [dict(held_out.measure(planned())) for _ in range(2)]
        np.testing.assert_array_equal(found[0]["batch_valid_loss"], found[1]["batch_valid_loss"])
        found[0] |= losses.measure(planned())
        assert not parts.ledger.reduce().token_count.any()
        return found[0]
    finally:
        harness.close()


def write(folder: Path, shape: Shape, micro: int, masked: bool, name: str) -> Path:
    runs.make_data(folder / "data")
    if masked:
        runs.add_sidecars(folder / "data")
    content = runs.config(
        folder / "data",
        folder / "run",
        train_batch_size=BATCH,
        train_micro_batch_size_per_gpu=micro,
        eod_mask_loss=masked,
        **shape.keys,
    )
    return runs.write_config(folder / f"{name}.yml", content)


class Plain:
    """One process, whole tensors, torch's own cross-entropy."""

    def __init__(self, file: Path) -> None:
        checked = preflight(load_config([str(file)]), world_size=1, gpus=0)
        self.config, self.domains = checked.config, checked.domains
        self.model = GPT(self.config.model, seed=self.config.training.seed).eval()

    def losses(self, windows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Loss sums and tokens of windows."""
        batch = torch.tensor(np.stack(windows).astype(np.int64))
        with torch.no_grad():
            hidden, weight = self.model(batch[:, :-1])
            logits = (hidden @ weight[:VOCABULARY].T).flatten(0, 1)
            losses = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        mask = torch.ones(len(windows), LENGTH)
        if self.config.training.eod_mask_loss:
            mask = (batch[:, :-1] != runs.EOD).float()
        summed = (losses.view(len(windows), LENGTH) * mask).double().sum(dim=1)
        return summed.numpy(), mask.sum(dim=1).double().numpy()


@pytest.mark.parametrize("masked", [False, True])
def test_they_equal_plain_pytorch_on_every_layout(
    pools: RankPools, tmp_path: Path, masked: bool
) -> None:
    plain = Plain(write(tmp_path, Shape(), 8, masked, "plain"))
    valid = np.full(3, np.nan)
    for domain in (0, 2):
        part, count = plain.domains.valid[domain], DOMAIN.count(domain)
        assert part is not None
        places = range(SEEN[domain] - count, SEEN[domain])
        windows = [part.sample(*divmod(place, part.num_windows(0))) for place in places]
        sums, tokens = plain.losses(windows)
        valid[domain] = sums.sum() / tokens.sum()
    rows = [plain.domains.train[d].sample(0, 30 + place) for place, d in enumerate(DOMAIN)]
    sums, tokens = plain.losses(rows)
    own = np.array([[d == k for d in DOMAIN] for k in range(3)])
    for name, shape, micro in (
        ("accumulation", Shape(), 2),
        ("data", Shape(data=2), 2),
        ("zero-3", Shape(data=2, zero=3), 4),
        ("tensor", Shape(tensor=2), 8),
        ("pipe", Shape(pipe=2), 2),
    ):
        file = write(tmp_path, shape, micro, masked, name)
        for found in pools.call(measure, shape.world, file):
            np.testing.assert_allclose(found["batch_valid_loss"], valid, rtol=2e-6, err_msg=name)
            np.testing.assert_allclose(found["loss_sum"], own @ sums, rtol=2e-6, err_msg=name)
            assert found["token_count"].tolist() == (own @ tokens).tolist()
            assert found["sample_count"].tolist() == [5, 0, 3]
            squares = own @ (sums / tokens) ** 2
            np.testing.assert_allclose(found["loss_square_sum"], squares, rtol=5e-6)
