"""Parallel layers beside their dense twins: what each case does on a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.model.attention import SelfAttention, build_rotary
from megatron.model.block import TransformerBlock
from megatron.model.init import normal
from megatron.model.mlp import MLP
from megatron.model.norm import build_norm
from megatron.parallel import Topology
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.partition import Partition
from megatron.parallel.rng import DropoutRng
from tests.support import dense
from tests.support.model_spec import TestSpec

BATCH, LENGTH, HIDDEN = 3, 8, 32
NEOX = TestSpec(rotary_pct=0.5, num_attention_heads=8)
LLAMA = TestSpec(
    norm="rmsnorm",
    rms_norm_epsilon=1e-6,
    activation="swiglu",
    intermediate_size=48,
    num_attention_heads=8,
    num_kv_heads=4,
    use_bias_in_attn_linear=False,
    use_bias_in_mlp=False,
)
MIXED = dataclasses.replace(
    LLAMA, use_bias_in_attn_linear=True, use_bias_in_mlp=True, pos_emb="none", norm="layernorm"
)

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""What was found and what the dense twin gives, by name."""

Cut = Callable[[torch.Tensor], torch.Tensor]
"""Takes this rank's part of a tensor that the twin has whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a layer is tried: a place among the ranks and a number format."""

    topology: Topology
    dtype: torch.dtype

    def scope(self) -> ParameterScope:
        return ParameterScope(seed=1, topology=self.topology, name="layer", dtype=self.dtype)

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        """Draw the same values on all tensor ranks; data ranks have their own."""
        seed = 1000 * self.topology.data_rank + sum(name.encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def sequence(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of ``[B, S, …]`` if the sequence is divided, else all of it."""
        if not self.topology.splits_sequence:
            return whole
        return whole.chunk(self.topology.tensor_size, dim=1)[self.topology.tensor_rank]

    def columns(self, *blocks: int) -> Cut:
        """Return what cuts the last of three dimensions as a parameter's rows are."""
        ranks, rank = self.topology.tensor_size, self.topology.tensor_rank
        return lambda whole: Partition(dim=2, blocks=blocks).part(whole, rank, ranks)

    def whole(self, part: torch.Tensor, partition: Partition | None) -> torch.Tensor:
        """Gather a divided parameter, or its gradient, from the tensor ranks."""
        if partition is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.topology.tensor_size)]
        dist.all_gather(parts, part.contiguous(), group=self.topology.tensor_group)
        return partition.join(parts)

    def true(self, part: torch.Tensor, partition: Partition | None) -> torch.Tensor:
        """Gather likewise; leave out what pads the vocabulary."""
        joined = self.whole(part, partition)
        return joined if partition is None else partition.unpad(joined)

    def shake(self, module: nn.Module) -> None:
        """Move all parameters away from their trivial first values, padding excepted."""
        for name, parameter in module.named_parameters():
            full, partition = list(parameter.shape), parameter.partition
            if partition is not None:
                full[partition.dim] = partition.padded_from or sum(partition.blocks)
            seed = sum(name.encode())
            noise = torch.randn(full, generator=torch.Generator().manual_seed(seed)).mul_(0.3)
            if partition is not None:
                noise = partition.part(
                    partition.pad(noise), self.topology.tensor_rank, self.topology.tensor_size
                )
            parameter.data.add_(noise)

    def compare(
        self,
        module: nn.Module,
        build: Callable[[dict[str, torch.Tensor]], nn.Module],
        value: torch.Tensor,
        *,
        cut_input: Cut,
        cut_output: Cut,
    ) -> Pairs:
        """Run the layer on its part of ``value`` and the twin on all of it, there and back."""
        self.shake(module)
        partitions = {name: each.partition for name, each in module.named_parameters()}
        twin = build(
            {
                name: self.true(each.detach(), partitions[name]).clone()
                for name, each in module.named_parameters()
            }
        )
        differentiable = value.is_floating_point()
        own = cut_input(value).clone().requires_grad_(differentiable)
        all_of_it = value.clone().requires_grad_(differentiable)
        found, expected = module(own), twin(all_of_it)
        upstream = self.draw("upstream", *expected.shape)
        found.backward(cut_output(upstream))
        expected.backward(upstream)
        pairs = {"output": (found.detach(), cut_output(expected.detach()))}
        if differentiable:
            pairs["input"] = (own.grad, cut_input(all_of_it.grad))
        for name, parameter in module.named_parameters():
            gradient = self.whole(parameter.grad, partitions[name])
            wanted = twin.get_parameter(name).grad
            pairs[name] = (gradient[: len(wanted)], wanted)
            if len(padding := gradient[len(wanted) :]):
                pairs[f"{name}, padding"] = (padding, torch.zeros_like(padding))
        return pairs


def _column(bench: Bench, blocks: tuple[int, ...], bias: bool, gather: bool) -> Pairs:
    layer = ColumnParallelLinear(
        bench.scope(),
        inputs=HIDDEN,
        outputs=blocks,
        initializer=normal(0.5),
        bias=bias,
        gather=gather,
    )
    # What is gathered is put together rank by rank, each rank's blocks in order.
    ranks = bench.topology.tensor_size
    order = Partition(dim=2, blocks=blocks)

    def gathered(whole: torch.Tensor) -> torch.Tensor:
        return torch.cat([order.part(whole, rank, ranks) for rank in range(ranks)], dim=2)

    return bench.compare(
        layer,
        dense.linear,
        bench.draw("x", BATCH, LENGTH, HIDDEN),
        cut_input=bench.sequence,
        cut_output=gathered if gather else bench.columns(*blocks),
    )


def _row(bench: Bench, bias: bool) -> Pairs:
    layer = RowParallelLinear(
        bench.scope(), inputs=24, outputs=HIDDEN, initializer=normal(0.5), bias=bias
    )
    return bench.compare(
        layer,
        dense.linear,
        bench.draw("x", BATCH, LENGTH, 24),
        cut_input=bench.columns(24),
        cut_output=bench.sequence,
    )


def _embedding(bench: Bench, vocabulary: int, padded: int) -> Pairs:
    layer = VocabParallelEmbedding(
        bench.scope(),
        vocabulary=vocabulary,
        padded=padded,
        hidden=HIDDEN,
        initializer=normal(0.5),
    )
    generator = torch.Generator().manual_seed(bench.topology.data_rank)
    return bench.compare(
        layer,
        lambda weights: nn.Embedding.from_pretrained(weights["weight"], freeze=False),
        torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator),
        cut_input=lambda tokens: tokens,
        cut_output=bench.sequence,
    )


def _stream(
    bench: Bench,
    layer: nn.Module,
    twin: Callable[[dict[str, torch.Tensor], TestSpec], nn.Module],
    spec: TestSpec,
) -> Pairs:
    """Compare a layer that maps the residual stream to itself."""
    return bench.compare(
        layer,
        lambda weights: twin(weights, spec),
        bench.draw("x", BATCH, LENGTH, HIDDEN),
        cut_input=bench.sequence,
        cut_output=bench.sequence,
    )


def _attention(bench: Bench, spec: TestSpec) -> Pairs:
    dropout = DropoutRng(seed=1, topology=bench.topology)
    layer = SelfAttention(bench.scope(), spec, layer=0, rotary=build_rotary(spec), dropout=dropout)
    return _stream(bench, layer, dense.DenseAttention, spec)


def _mlp(bench: Bench, spec: TestSpec) -> Pairs:
    return _stream(bench, MLP(bench.scope(), spec), dense.DenseMLP, spec)


def _norm(bench: Bench, spec: TestSpec) -> Pairs:
    return _stream(bench, build_norm(bench.scope(), spec), dense.norm, spec)


def _block(bench: Bench, spec: TestSpec) -> Pairs:
    dropout = DropoutRng(seed=1, topology=bench.topology)
    layer = TransformerBlock(
        bench.scope(), spec, layer=0, rotary=build_rotary(spec), dropout=dropout
    )
    return _stream(bench, layer, dense.DenseBlock, spec)


LAYERS: dict[str, tuple[Callable[..., Pairs], tuple[Any, ...]]] = {
    "column": (_column, ((24,), True, False)),
    "column of blocks without bias": (_column, ((16, 8, 8), False, False)),
    "column gathered": (_column, ((24,), True, True)),
    "column of blocks gathered": (_column, ((16, 8, 8), True, True)),
    "row": (_row, (True,)),
    "row without bias": (_row, (False,)),
    "embedding": (_embedding, (40, 40)),
    "embedding with padding": (_embedding, (37, 40)),
    "embedding of ranks without ids": (_embedding, (7, 16)),
    "attention, every head its own keys": (_attention, (NEOX,)),
    "attention, grouped": (_attention, (LLAMA,)),
    "attention, grouped, with biases": (_attention, (MIXED,)),
    "mlp": (_mlp, (NEOX,)),
    "mlp, gated": (_mlp, (LLAMA,)),
    "mlp, gated, with biases": (_mlp, (MIXED,)),
    "layernorm": (_norm, (NEOX,)),
    "rmsnorm": (_norm, (LLAMA,)),
    "block": (_block, (NEOX,)),
    "block side by side": (_block, (dataclasses.replace(MIXED, gpt_j_residual=True),)),
    "block, llama": (_block, (LLAMA,)),
}
