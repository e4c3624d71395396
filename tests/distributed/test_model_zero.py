"""The model under DeepSpeed's ZeRO stages: the same losses and weights as plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron.model import GPT, DomainLoss, param_groups
from tests.support.gloo import run_ranks
from tests.support.model_spec import TestSpec

STEPS, ACCUMULATION, ROWS = 3, 2, 2
SPEC = TestSpec(hidden_size=32, seq_length=16)


def _global_batch(step: int, data_size: int) -> list[torch.Tensor]:
    """Tokens of every micro-batch of a step, [ROWS, S + 1] each, in global order."""
    generator = torch.Generator().manual_seed(step)
    count = ACCUMULATION * data_size
    return list(
        torch.randint(0, SPEC.vocab_size, (count, ROWS, SPEC.seq_length + 1), generator=generator)
    )


def _labels(tokens: torch.Tensor, data_size: int, *, share: float) -> tuple[torch.Tensor, ...]:
    targets = tokens[:, 1:].contiguous()
    mask = (targets % 5 != 0).float()
    weight = torch.full((ROWS,), share / (ROWS * SPEC.seq_length * data_size * ACCUMULATION))
    return targets, mask, torch.arange(ROWS), weight


def _reference(spec: TestSpec, data_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = GPT(spec, seed=5, loss_fn=DomainLoss(vocab_size=spec.vocab_size, chunk_tokens=7))
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2, eps=1e-3)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro, tokens in enumerate(_global_batch(step, data_size)):
            model.dropout.begin(step=step, micro_batch=micro)
            loss = model(tokens[:, :-1], _labels(tokens, data_size, share=1.0))
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        with torch.no_grad():
            losses.append(model(tokens[:, :-1], _labels(tokens, 1, share=1.0)).item())
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


def _train(
    rank: int, world_size: int, spec: TestSpec, stage: int, bf16: bool
) -> tuple[list[float], dict[str, Any]]:
    import deepspeed

    model = GPT(spec, seed=5, loss_fn=DomainLoss(vocab_size=spec.vocab_size, chunk_tokens=7))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2, eps=1e-3),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            # DeepSpeed clips at 1.0 when the key is absent.
            "gradient_clipping": 0.0,
            "bf16": {"enabled": bf16},
            "zero_optimization": {
                "stage": stage,
                # Persistent parameters would hide a weight that is not gathered.
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
        },
    )
    losses = []
    for step in range(STEPS):
        batch = _global_batch(step, world_size)
        total = torch.zeros(())
        for micro in range(ACCUMULATION):
            tokens = batch[micro * world_size + rank]
            model.dropout.begin(step=step, micro_batch=micro)
            labels = _labels(tokens, world_size, share=float(ACCUMULATION * world_size))
            loss = engine(tokens[:, :-1], labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (ACCUMULATION * world_size)
        torch.distributed.all_reduce(total)
        losses.append(total.item())
        engine.eval()
        with torch.no_grad():
            losses.append(engine(batch[-1][:, :-1], _labels(batch[-1], 1, share=1.0)).item())
        engine.train()
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            weights[name] = parameter.detach().clone()
    return losses, weights


def _cases(rank: int, world_size: int, stage: int, specs: list[TestSpec], bf16: bool) -> list[Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return [_train(rank, world_size, spec, stage, bf16) for spec in specs]


SPECS = [
    dataclasses.replace(
        SPEC, no_weight_tying=not tied, checkpoint_activations=recompute, checkpoint_num_layers=2
    )
    for tied in (True, False)
    for recompute in (False, True)
]


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_trains_as_plain_pytorch_does(stage: int) -> None:
    for rank in run_ranks(_cases, 2, stage, SPECS, False):
        for spec, (other_losses, other_weights) in zip(SPECS, rank, strict=True):
            losses, weights = _reference(spec, data_size=2)
            assert other_losses == pytest.approx(losses, rel=1e-5)
            assert weights.keys() == other_weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=2e-5)


def test_zero_3_in_bf16_follows_plain_pytorch_in_fp32() -> None:
    for rank in run_ranks(_cases, 2, 3, SPECS[1:3], True):
        for spec, (other_losses, _) in zip(SPECS[1:3], rank, strict=True):
            assert other_losses == pytest.approx(_reference(spec, data_size=2)[0], rel=5e-3)
