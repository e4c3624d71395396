"""The same model description divided by tensors and cut into stages, against the whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron.model import GPT, DomainLoss, layers, param_groups
from megatron.parallel import Layout, Topology
from megatron.parallel.partition import Partition
from tests.support.gloo import run_ranks
from tests.support.model_spec import TestSpec
from tests.support.whole_gpt import train_whole

# Padded to 88 rows on one rank, to 96 on two and on four; Llama's to 128 on four, where the last
# rank holds nothing but padding.
NEOX = TestSpec(vocab_size=83, gpt_j_residual=True, rotary_pct=0.5)
LLAMA = TestSpec(
    vocab_size=83,
    make_vocab_size_divisible_by=16,
    norm="rmsnorm",
    activation="swiglu",
    intermediate_size=48,
    num_attention_heads=8,
    num_kv_heads=4,
    no_weight_tying=True,
    use_bias_in_attn_linear=False,
    use_bias_in_mlp=False,
)
SPECS = [
    dataclasses.replace(spec, checkpoint_activations=recompute, no_weight_tying=untied)
    for spec in (NEOX, LLAMA)
    for recompute in (False, True)
    for untied in (False, True)
]
# One norm for both halves of a block with a scale of one number, under µP; no parameters in norms.
TIED = dataclasses.replace(
    NEOX,
    norm="scalenorm",
    gpt_j_tied=True,
    use_mup=True,
    mup_base_hidden_size=16,
    mup_embedding_mult=3.0,
)
BARE = dataclasses.replace(LLAMA, norm="non_parametric_layernorm")
OTHERS = [
    TIED,
    BARE,
    dataclasses.replace(NEOX, use_bias_in_norms=False),
    dataclasses.replace(LLAMA, rms_norm_epsilon_outside_root=True),
]
MIXED = dataclasses.replace(
    NEOX, attention_config=("gmlp", "amlp"), gmlp_attn_dim=8, checkpoint_activations=True
)
MICRO_BATCHES = 2


def _batch(row: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    tokens = torch.randint(0, 83, (2, 17), generator=torch.Generator().manual_seed(row))
    mask = (tokens[:, 1:] % 4 != 0).float()
    labels = (tokens[:, 1:].contiguous(), mask, torch.arange(2), torch.tensor([0.02, 0.04]))
    return tokens[:, :-1].contiguous(), labels


def _run(spec: TestSpec, topology: Topology) -> dict[str, Any]:
    seen: list[torch.Tensor] = []
    loss_fn = DomainLoss(
        vocab_size=spec.vocab_size,
        topology=topology,
        chunk_tokens=9,
        observe=lambda sums, *_: seen.append(sums),
    )
    model = GPT(spec, topology, seed=3, loss_fn=loss_fn)
    for micro in range(MICRO_BATCHES):
        tokens, labels = _batch(micro)
        loss = model(tokens, labels)
        loss.backward()
    hidden, weight = model(tokens)
    return {
        "loss": loss.detach(),
        "sums": torch.stack(seen),
        "losses": loss_fn.token_losses(hidden, weight, labels[0]),
        "squares": _squares(model, topology),
        "weights": {name: value.detach() for name, value in model.named_parameters()},
        "gradients": {name: value.grad for name, value in model.named_parameters()},
        "partitions": {name: value.partition for name, value in model.named_parameters()},
    }


def _squares(model: GPT, topology: Topology) -> float:
    """Sum the squared gradients that DeepSpeed counts here: of a copy, the first rank's only."""
    return sum(
        parameter.grad.double().square().sum().item()
        for parameter in model.parameters()
        if topology.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
    )


def _tensor_parallel(rank: int, world_size: int, specs: list[TestSpec]) -> list[dict[str, Any]]:
    layout = Layout(world_size=world_size, tensor_size=world_size)
    plain = Topology.create(layout, rank)
    divided = dataclasses.replace(plain, sequence_parallel=True)
    return [_run(spec, topology) for spec in specs for topology in (plain, divided)]


@pytest.mark.parametrize(
    ("ranks", "specs"),
    [(2, [*SPECS, *OTHERS]), (4, SPECS[::3]), pytest.param(4, SPECS, marks=pytest.mark.slow)],
)
def test_tensor_ranks_are_one_model(ranks: int, specs: list[TestSpec]) -> None:
    results = run_ranks(_tensor_parallel, ranks, specs)
    for index, spec in enumerate(specs):
        whole = _run(spec, Topology.single())
        for parts in ([rank[2 * index + divided] for rank in results] for divided in (0, 1)):
            _check_parts(parts, whole)


def _check_parts(parts: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for part in parts:
        for name in ("loss", "sums", "losses"):
            torch.testing.assert_close(part[name], whole[name], rtol=2e-6, atol=1e-6)
    squares = sum(part["squares"] for part in parts)
    assert squares == pytest.approx(whole["squares"], rel=1e-5)
    for name, partition in parts[0]["partitions"].items():
        weight, gradient = (
            _joined([part[kind][name] for part in parts], partition, name)
            for kind in ("weights", "gradients")
        )
        expected, expected_gradient = (
            _joined([whole[kind][name]], whole["partitions"][name], name)
            for kind in ("weights", "gradients")
        )
        assert torch.equal(weight, expected), name
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def _joined(parts: list[torch.Tensor], partition: Partition | None, name: str) -> torch.Tensor:
    """Join the ranks' parts and leave out the vocabulary's padding, which is exactly 0."""
    if partition is None:
        assert all(torch.equal(parts[0], part) for part in parts), name
        return parts[0]
    joined = partition.join(parts)
    true = partition.unpad(joined)
    assert not joined[len(true) :].any(), name
    return true


def _pipelines(
    rank: int, world_size: int, specs: list[TestSpec]
) -> list[tuple[list[float], dict[str, Any]]]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return [_pipeline(rank, spec) for spec in specs]


def _pipeline(rank: int, spec: TestSpec) -> tuple[list[float], dict[str, Any]]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    described = layers(spec, Topology(layout=Layout(world_size=2, pipe_size=2), rank=rank), seed=3)
    specs = [
        LayerSpec(layer.module_type, **layer.arguments)
        if layer.tied_key is None
        else TiedLayerSpec(
            layer.tied_key,
            layer.module_type,
            forward_fn=layer.forward,
            tied_weight_attr=list(layer.tied_weights),
            **layer.arguments,
        )
        for layer in described
    ]
    module = PipelineModule(
        specs,
        num_stages=2,
        loss_fn=DomainLoss(vocab_size=spec.vocab_size, chunk_tokens=9),
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(param_groups(module, 0.1), lr=1e-2, eps=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses = []
    for step in range(3):
        micro_batches = iter([_batch(10 * step + micro) for micro in range(2)])
        losses.append(engine.train_batch(data_iter=micro_batches).item())
    return losses, {name: value.detach().clone() for name, value in module.named_parameters()}


def _whole(spec: TestSpec) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = GPT(spec, seed=3, loss_fn=DomainLoss(vocab_size=spec.vocab_size, chunk_tokens=9))
    return train_whole(model, _batch)


def test_two_stages_are_one_model() -> None:
    specs = [NEOX, LLAMA, TIED, BARE, MIXED]
    ranks = run_ranks(_pipelines, 2, specs)
    for index, spec in enumerate(specs):
        losses, weights = _whole(spec)
        names = set()
        for stage_losses, stage_weights in (results[index] for results in ranks):
            assert stage_losses == pytest.approx(losses, rel=1e-5)
            names |= stage_weights.keys()
            for name, value in stage_weights.items():
                torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=2e-5)
        assert names == weights.keys()
