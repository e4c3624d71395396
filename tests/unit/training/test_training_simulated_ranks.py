"""Thousands of ranks and a thousand domains, in integers: nothing here starts a process."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.model_spec import TestSpec

from megatron.config.batch import BatchConfig, resolve_batch
from megatron.data.sampler import Sampler
from megatron.model import layers
from megatron.model.accounting import (
    held_parameters,
    layer_names,
    layer_parameters,
    parameter_count,
)
from megatron.parallel import Layout, Topology
from megatron.parallel.stages import layer_weights, stage_bounds

# (world, tensor, pipe); data ranks are what is left.
LAYOUTS = [
    (1, 1, 1),
    (6, 3, 2),
    (64, 8, 8),
    (96, 4, 3),
    (512, 8, 4),
    (1024, 1, 1),
    (1024, 1, 64),
    (4096, 8, 16),
    (4096, 16, 64),
    (4096, 1, 1),
]
IDS = [f"{world}-tp{tensor}-pp{pipe}" for world, tensor, pipe in LAYOUTS]


def layout_of(sizes: tuple[int, int, int]) -> Layout:
    return Layout(world_size=sizes[0], tensor_size=sizes[1], pipe_size=sizes[2])


@pytest.mark.parametrize("sizes", LAYOUTS, ids=IDS)
def test_every_rank_has_its_own_place_in_three_groups(sizes: tuple[int, int, int]) -> None:
    layout = layout_of(sizes)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    for kind in ("tensor", "data", "pipe"):
        groups = getattr(layout, f"{kind}_groups")()
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(layout.world_size))
        others = {"tensor", "data", "pipe"} - {kind}
        for group in groups:
            size = getattr(layout, f"{kind}_size")
            assert [getattr(places[rank], kind) for rank in group] == list(range(size))
            for other in others:
                assert len({getattr(places[rank], other) for rank in group}) == 1


@pytest.mark.parametrize("sizes", LAYOUTS, ids=IDS)
def test_deepspeeds_grid_puts_every_rank_in_the_same_place(sizes: tuple[int, int, int]) -> None:
    grid = pytest.importorskip("deepspeed.runtime.pipe.topology")
    layout = layout_of(sizes)
    theirs = grid.PipeModelDataParallelTopology(
        num_pp=layout.pipe_size, num_mp=layout.tensor_size, num_dp=layout.data_size
    )
    for (pipe, data, model), rank in theirs.mapping.items():
        place = layout.coordinates(rank)
        assert (pipe, data, model) == (place.pipe, place.data, place.tensor)
    for axis, groups in (
        ("model", layout.tensor_groups()),
        ("data", layout.data_groups()),
        ("pipe", layout.pipe_groups()),
    ):
        # DeepSpeed makes no list of an axis that has one rank only.
        lists = theirs.get_axis_comm_lists(axis) or [[rank] for rank in range(layout.world_size)]
        assert sorted(map(sorted, lists)) == sorted(groups)


@pytest.mark.parametrize(
    ("sizes", "rank"),
    [
        ((64, 4, 4), 0),
        ((64, 4, 4), 37),
        ((64, 4, 4), 63),
        ((4096, 8, 16), 4095),
    ],
)
def test_process_groups_are_the_layouts(
    sizes: tuple[int, int, int], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's fake process group, which knows every rank and talks to none."""
    # Numbers on the host need gloo, which would talk.
    monkeypatch.setattr("megatron.parallel.topology._host_group", lambda group, *_: group)
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=rank, world_size=sizes[0], store=fake.FakeStore())
    try:
        layout = layout_of(sizes)
        topology = Topology.create(layout, rank)
        for kind in ("tensor", "data", "pipe"):
            own = next(group for group in getattr(layout, f"{kind}_groups")() if rank in group)
            group = getattr(topology, f"{kind}_group")
            assert dist.get_process_group_ranks(group) == own, kind
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", LAYOUTS, ids=IDS)
def test_data_ranks_share_out_the_global_batch(sizes: tuple[int, int, int]) -> None:
    layout = layout_of(sizes)
    micro, accumulation = 2, 3
    total = micro * accumulation * layout.data_size
    sampler = Sampler(["a", "b"], [1000, 10**9], seed=7, global_batch=total)
    plan = sampler.plan(1, [0.25, 0.75])
    slots = [
        plan.slots(micro, accumulation, data, layout.data_size) for data in range(layout.data_size)
    ]
    together = np.concatenate([own.ravel() for own in slots])
    assert np.array_equal(np.sort(together), np.arange(total))
    # Micro-batch by micro-batch the ranks read on where the others stop.
    assert np.array_equal(np.stack(slots, axis=1).ravel(), np.arange(total))
    for rank in range(0, layout.world_size, max(1, layout.world_size // 97)):
        place = layout.coordinates(rank)
        topology = Topology(layout=layout, rank=rank)
        # Tensor peers and the stages of a pipeline work on the same samples.
        assert topology.data_rank == place.data
        for peer in (
            layout.rank_at(pipe=place.pipe, data=place.data, tensor=0),
            layout.rank_at(pipe=0, data=place.data, tensor=place.tensor),
            layout.rank_at(pipe=layout.pipe_size - 1, data=place.data, tensor=place.tensor),
        ):
            assert Topology(layout=layout, rank=peer).data_rank == topology.data_rank


DOMAINS = 1000
NAMES = [f"domain-{index}" for index in range(DOMAINS)]
WINDOWS = [(index * 7919) % 100_000 + 1 for index in range(DOMAINS)]


def weights_at(step: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(step).dirichlet(np.full(DOMAINS, 0.3))


def new_sampler(total: int) -> Sampler:
    return Sampler(NAMES, WINDOWS, seed=11, global_batch=total)


def test_a_thousand_domains_are_sampled_alike_on_every_layout_and_after_re_layout() -> None:
    total, steps = 4096, 12
    one = new_sampler(total)
    whole = [one.plan(step, weights_at(step)) for step in range(1, steps + 1)]
    state = json.dumps(one.state_dict(), sort_keys=True)
    current: dict[str, Any] | None = None
    for step, sizes in zip(range(1, steps + 1), itertools.cycle(LAYOUTS), strict=False):
        layout = layout_of(sizes)
        micro = 1 if total // layout.data_size < 4 else 2
        batch = BatchConfig(train_batch_size=total, train_micro_batch_size_per_gpu=micro)
        micro, accumulation, _ = resolve_batch(batch, layout.data_size)
        # Every step on another layout, from the state that the one before left behind.
        resumed = new_sampler(total)
        if current is not None:
            resumed.load_state_dict(current)
        plan = resumed.plan(step, weights_at(step))
        reference = whole[step - 1]
        ordered = np.empty(total, dtype=np.int64)
        for data in range(layout.data_size):
            slots = plan.slots(micro, accumulation, data, layout.data_size)
            ordered[slots] = slots
        assert np.array_equal(ordered, np.arange(total))
        for field in ("domain", "epoch", "sample"):
            assert np.array_equal(getattr(plan, field), getattr(reference, field)), (sizes, field)
        current = json.loads(json.dumps(resumed.state_dict()))
    assert json.dumps(current, sort_keys=True) == state


@pytest.mark.parametrize("steps", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_thousand_domains_get_their_shares_at_every_step(steps: int) -> None:
    total = 1024
    sampler = new_sampler(total)
    asked, drawn = np.zeros(DOMAINS), np.zeros(DOMAINS)
    for step in range(1, steps + 1):
        weights = weights_at(step)
        drawn += sampler.plan(step, weights).counts()
        asked += total * weights / weights.sum()
        assert np.abs(drawn - asked).max() <= 1 + math.log(DOMAINS), step
    assert drawn.sum() == steps * total
    assert np.array_equal(drawn, sampler.samples_seen)


LARGE = TestSpec(
    vocab_size=50257,
    make_vocab_size_divisible_by=128,
    num_layers=96,
    hidden_size=12288,
    num_attention_heads=96,
    seq_length=2048,
)


@pytest.mark.parametrize("method", ["uniform", "parameters", "type:transformer"])
@pytest.mark.parametrize("stages", [1, 2, 12, 48, 64, 96])
def test_a_hundred_layers_on_many_stages(method: str, stages: int) -> None:
    names, counts = layer_names(LARGE), layer_parameters(LARGE, 8)
    weights = layer_weights(method, names=names, parameters=counts)
    bounds = stage_bounds(weights, stages)
    sums = [sum(weights[low:high]) for low, high in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 99, stages + 1)
    assert all(sums)
    if method != "parameters":
        assert max(sums) == -(-sum(weights) // stages)
    else:
        assert max(sums) >= max(max(weights), sum(weights) / stages)
        assert max(sums) <= sum(weights) / stages + max(weights)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 4), (8, 16), (32, 64)])
def test_ranks_hold_the_model_between_them(tensor: int, stages: int, untied: bool) -> None:
    spec = TestSpec(**{**vars(LARGE), "no_weight_tying": untied})
    weights = layer_weights(
        "type:transformer", names=layer_names(spec), parameters=layer_parameters(spec, tensor)
    )
    bounds = stage_bounds(weights, stages)
    held = sum(
        held_parameters(spec, low, high, tensor_size=tensor)
        for low, high in itertools.pairwise(bounds)
    )
    # On top of the model, once: what every tensor rank has whole, and the second copy of a tied
    # embedding at the other end of a pipeline.
    hidden = spec.hidden_size
    replicated = spec.num_layers * 6 * hidden + 2 * hidden
    second = 0 if untied or stages == 1 else spec.padded_vocab_size(tensor) * hidden
    total = parameter_count(spec, tensor_size=tensor)
    assert held * tensor == total + (tensor - 1) * replicated + second


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 8, "activation": "swiglu"}, {"no_weight_tying": True}]
)
def test_tensor_ranks_cover_every_number_exactly_once(ranks: int, changes: dict[str, Any]) -> None:
    """The parts that the layers build, against numbered parameters cut and joined again."""
    spec = TestSpec(
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=96,
        vocab_size=100,
        **changes,
    )

    def built(size: int, rank: int) -> list[dict[str, Any]]:
        topology = Topology(layout=Layout(world_size=size, tensor_size=size), rank=rank)
        return [
            dict(one.build().named_parameters())
            for one in layers(spec, topology, seed=3, device="meta")
        ]

    whole, divided = built(1, 0), set()
    for layer, parameters in enumerate(built(ranks, ranks - 1)):
        for name, part in parameters.items():
            partition = part.partition
            shape = list(whole[layer][name].shape)
            if partition is None:
                assert list(part.shape) == shape, name
                continue
            divided.add(name)
            shape[partition.dim] = sum(partition.blocks)  # the vocabulary is padded for the ranks
            numbered = torch.arange(math.prod(shape)).view(shape)
            parts = [partition.part(numbered, rank, ranks) for rank in range(ranks)]
            assert parts[-1].shape == part.shape, name
            every = torch.cat([one.flatten() for one in parts])
            assert torch.equal(every.sort().values, numbered.flatten()), name
            assert torch.equal(partition.join(parts), numbered), name
    assert {"word_embeddings.weight", "attention.query_key_value.bias"} <= divided
    assert {"attention.dense.weight", "mlp.dense_4h_to_h.weight"} <= divided
