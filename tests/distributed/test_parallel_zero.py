"""Tensor ranks, a divided sequence and ZeRO together train as plain PyTorch does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron.engine.mpu import forget_grid, grid
from megatron.model import GPT, DomainLoss, param_groups
from megatron.parallel import Layout, Topology
from tests.support.gloo import run_ranks
from tests.support.model_spec import TestSpec

STEPS, ACCUMULATION, ROWS, LENGTH = 3, 2, 2, 16
CLIPPING = 0.05
NEOX = TestSpec(vocab_size=83, seq_length=LENGTH, checkpoint_activations=True)
LLAMA = dataclasses.replace(
    NEOX,
    norm="rmsnorm",
    activation="swiglu",
    intermediate_size=48,
    num_kv_heads=2,
    no_weight_tying=True,
    checkpoint_activations=False,
)


def _micro_batch(step: int, place: int, share: float) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Return micro-batch number ``place`` of a step's, with its share of the mean."""
    generator = torch.Generator().manual_seed(100 * step + place)
    tokens = torch.randint(0, 83, (ROWS, LENGTH + 1), generator=generator)
    mask = (tokens[:, 1:] % 5 != 0).float()
    weight = torch.full((ROWS,), share / (ROWS * LENGTH))
    return tokens[:, :-1], (tokens[:, 1:].contiguous(), mask, torch.arange(ROWS), weight)


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    # A large eps keeps Adam from blowing a gradient of rounding's size up to a full step.
    return torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2, eps=1e-3)


def _reference(spec: TestSpec, data_size: int) -> tuple[list[float], list[float], dict[str, Any]]:
    model = GPT(spec, seed=5, loss_fn=DomainLoss(vocab_size=83, chunk_tokens=7))
    optimizer, count = _optimizer(model), ACCUMULATION * data_size
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(model(*_micro_batch(step, place, 1 / count)) for place in range(count))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: value.detach() for name, value in model.named_parameters()}


def _train(topology: Topology, spec: TestSpec, stage: int) -> dict[str, Any]:
    import deepspeed

    loss_fn = DomainLoss(vocab_size=83, topology=topology, chunk_tokens=7)
    model = GPT(spec, topology, seed=5, loss_fn=loss_fn)
    partitions = {name: value.partition for name, value in model.named_parameters()}
    forget_grid()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model),
        mpu=grid(topology.layout),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": CLIPPING,
            # Persistent parameters would hide a weight that is not gathered.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses, norms, data_size = [], [], topology.data_size
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(ACCUMULATION):
            # DeepSpeed takes the mean over micro-batches and data ranks: shares are of one.
            tokens, labels = _micro_batch(step, micro * data_size + topology.data_rank, 1.0)
            loss = engine(tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (ACCUMULATION * data_size)
        torch.distributed.all_reduce(total, group=topology.data_group)
        losses.append(total.item())
        norms.append(float(engine.get_global_grad_norm()))
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            weights[name] = parameter.detach().clone()
    return {"losses": losses, "norms": norms, "weights": weights, "partitions": partitions}


def _case(rank: int, world_size: int, spec: TestSpec, stage: int) -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    layout = Layout(world_size=world_size, tensor_size=2)
    topology = Topology.create(layout, rank, sequence_parallel=True)
    return _train(topology, spec, stage)


@pytest.mark.parametrize(
    ("spec", "stage"),
    [
        pytest.param(NEOX, 3, id="neox, 3"),
        pytest.param(LLAMA, 3, id="llama, 3", marks=pytest.mark.slow),
        pytest.param(NEOX, 2, id="neox, 2", marks=pytest.mark.slow),
        pytest.param(LLAMA, 1, id="llama, 1", marks=pytest.mark.slow),
    ],
)
def test_zero_and_a_divided_sequence_train_as_plain_pytorch_does(
    spec: TestSpec, stage: int
) -> None:
    results = run_ranks(_case, 4, spec, stage)
    losses, norms, weights = _reference(spec, data_size=2)
    assert min(norms) > CLIPPING, "nothing was clipped: the norm was not put to use"
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
    for key, expected in weights.items():
        partition = results[0]["partitions"][key]
        for first in (0, 2):  # the two pairs of tensor ranks
            pair = [result["weights"][key] for result in results[first : first + 2]]
            if partition is None:
                found = pair[0]
                assert torch.equal(*pair), key
            else:
                found = partition.unpad(partition.join(pair))
            torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=2e-5)
