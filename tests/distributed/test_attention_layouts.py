"""Positions, documents and masks under tensor ranks, a divided sequence and a pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megatron.config.attention import SparsityConfig
from megatron.model import GPT, DomainLoss, layers, param_groups
from megatron.model.kv_cache import KVCache
from megatron.parallel import Layout, Topology
from megatron.parallel.collectives import gather_last_dimension
from megatron.parallel.rng import DropoutRng
from megatron.parallel.sequence import enter_shared
from tests.support.gloo import run_ranks
from tests.support.model_spec import TestSpec
from tests.support.whole_gpt import train_whole

EOD = 82
SPEC = TestSpec(
    vocab_size=83,
    init_method_std=0.2,
    reset_attention_mask=True,
    reset_position_ids=True,
    eod_token_id=EOD,
)
CHANGES: list[dict[str, Any]] = [
    {"pos_emb": "learned", "use_qk_layernorm": True, "num_kv_heads": 2},
    {"pos_emb": "rpe", "checkpoint_activations": True},
    {"pos_emb": "rpe", "no_weight_tying": True, "reset_attention_mask": False, "num_layers": 3},
    {
        "pos_emb": "alibi",
        "attention_config": ("sparse_fixed", "bigbird"),
        "sparsity_config": SparsityConfig(
            block=2, different_layout_per_head=True, num_different_global_patterns=4
        ),
        "norm": "rmsnorm",
        "use_qk_layernorm": True,
    },
    {"pos_emb": "rotary", "sliding_window_width": 5, "rotary_pct": 0.5},
    {"pos_emb": "sinusoidal"},
]
SPECS = [
    dataclasses.replace(
        SPEC,
        **{"reset_position_ids": change.get("reset_attention_mask", True), **change},
    )
    for change in CHANGES
]


def batch(number: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Two rows with documents of other lengths, which end with the same nine tokens."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, EOD, (2, 17), generator=draw)
    tokens[1, -10:] = tokens[0, -10:]
    tokens[0, 6], tokens[1, 6], tokens[1, 2] = EOD, EOD, EOD
    labels = (
        tokens[:, 1:].contiguous(),
        torch.ones(2, 16),
        torch.arange(2),
        torch.tensor([0.02, 0.04]),
    )
    return tokens[:, :-1].contiguous(), labels


def logits(output: Any, topology: Topology) -> torch.Tensor:
    part, weight = output
    own = enter_shared(part, topology) @ weight.T
    return gather_last_dimension(own, topology)[..., :83]


def whole_run(spec: TestSpec) -> dict[str, Any]:
    """Train three steps in one process."""
    model = GPT(spec, seed=3, loss_fn=DomainLoss(vocab_size=83, chunk_tokens=9))
    first = logits(model(batch()[0]), Topology.single()).detach()
    return {"logits": first, "weights": train_whole(model, batch)[1]}


def tensor_ranks(rank: int, world_size: int, specs: list[TestSpec]) -> list[list[dict[str, Any]]]:
    plain = Topology.create(Layout(world_size=world_size, tensor_size=world_size), rank)
    divided = dataclasses.replace(plain, sequence_parallel=True)
    return [[tensor_run(spec, topology) for topology in (plain, divided)] for spec in specs]


def tensor_run(spec: TestSpec, topology: Topology) -> dict[str, Any]:
    model = GPT(
        spec, topology, seed=3, loss_fn=DomainLoss(vocab_size=83, chunk_tokens=9, topology=topology)
    )
    with torch.no_grad():
        first = logits(model(batch()[0]), topology)
        cached = model.eval() and token_by_token(model, topology)
    model.train()
    for micro in range(2):
        (model(*batch(micro)) / 2).backward()
    return {
        "logits": first,
        "cached": cached,
        "gradients": {name: value.grad for name, value in model.named_parameters()},
        "partitions": {name: value.partition for name, value in model.named_parameters()},
    }


def token_by_token(model: GPT, topology: Topology) -> torch.Tensor:
    """Run the first row pair by pair (a divided sequence needs a length that divides)."""
    tokens, _ = batch()
    cache = KVCache(rows=2, capacity=16)
    parts = []
    with cache.attached(model):
        for first, last in ((0, 6), *((place, place + 2) for place in range(6, 16, 2))):
            cache.advance(torch.arange(first, last).expand(2, -1))
            parts.append(logits(model(tokens[:, first:last]), topology))
    return torch.cat(parts, dim=1)


def test_tensor_ranks_hold_the_same_positions() -> None:
    results = run_ranks(tensor_ranks, 2, SPECS)
    for index, spec in enumerate(SPECS):
        whole = tensor_run(spec, Topology.single())
        for mode in (0, 1):
            parts = [rank[index][mode] for rank in results]
            for part in parts:
                for name in ("logits", "cached"):
                    torch.testing.assert_close(part[name], whole["logits"], rtol=0, atol=1e-5)
                if spec.reset_attention_mask:
                    one, other = part["logits"][:, 7:]
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            for name, partition in whole["partitions"].items():
                found = [part["gradients"][name] for part in parts]
                if partition is None:
                    assert torch.equal(*found), name
                    gradient = found[0]
                else:
                    gradient = partition.unpad(parts[0]["partitions"][name].join(found))
                expected = whole["gradients"][name]
                if partition is not None:
                    expected = partition.unpad(expected)
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def stages(rank: int, world_size: int, specs: list[TestSpec]) -> list[dict[str, Any]]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return [stage(rank, spec, bounds) for spec in specs for bounds in cuts(spec)]


def cuts(spec: TestSpec) -> list[list[int]]:
    """Cut behind the first block, and leave the last stage without a block."""
    total = spec.num_layers + 3
    return [[0, 2, total], [0, total - 2, total]]


def stage(rank: int, spec: TestSpec, bounds: list[int]) -> dict[str, Any]:

    from megatron.engine.pipeline import PipelineEngine, Stage

    topology = Topology.create(Layout(world_size=2, pipe_size=2), rank)
    dropout = DropoutRng(seed=3, topology=topology)
    held = Stage(
        layers(spec, topology, seed=3, dropout=dropout),
        topology=topology,
        bounds=bounds,
        loss_fn=DomainLoss(vocab_size=83, chunk_tokens=9),
        dropout=dropout,
        recomputed=1 if spec.checkpoint_activations else 0,
    )
    engine = PipelineEngine(
        stage=held,
        optimizer=torch.optim.AdamW(param_groups(held, 0.1), lr=1e-2, eps=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    seen: list[torch.Tensor] = []

    def keep(output: Any, labels: Any) -> torch.Tensor:
        seen.append(logits(output, topology).clone())
        return output[0].sum() * 0

    engine.evaluate(iter([batch()]), 1, loss_fn=keep)
    cached: list[torch.Tensor] = []
    cache = KVCache(rows=2, capacity=16)
    with cache.attached(held):
        for first, last in ((0, 6), (6, 7), (7, 16)):
            cache.advance(torch.arange(first, last).expand(2, -1))
            seen_before = len(seen)
            engine.evaluate(iter([(batch()[0][:, first:last], batch()[1])]), 1, loss_fn=keep)
            cached += seen[seen_before:]
    for step in range(3):
        engine.train_step(step + 1, iter([batch(10 * step + m) for m in range(2)]), lr=1e-2)
    names = {name: value.detach().clone() for name, value in held.named_parameters()}
    return {
        "logits": seen[0] if seen else None,
        "cached": torch.cat(cached, dim=1) if cached else None,
        "weights": names,
    }


def test_stages_tell_each_other_of_documents_and_biases() -> None:
    results = run_ranks(stages, 2, SPECS, timeout=180)
    index = 0
    for spec in SPECS:
        whole = whole_run(spec)
        for _ in cuts(spec):
            names = set()
            for part in (rank[index] for rank in results):
                if part["logits"] is not None:
                    for name in ("logits", "cached"):
                        torch.testing.assert_close(part[name], whole["logits"], rtol=0, atol=1e-5)
                names |= part["weights"].keys()
                for name, value in part["weights"].items():
                    expected = whole["weights"][name]
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5, msg=name)
            assert names == whole["weights"].keys()
            last = results[1][index]["weights"]
            assert not any("position" in name or "relative" in name for name in last), last.keys()
            index += 1
