"""Rank arithmetic, against DeepSpeed's grid and up to thousands of ranks."""

from __future__ import annotations

import itertools

import pytest

from megatron.errors import ConfigError
from megatron.parallel import Layout, Topology


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 5))))
def test_coordinates_and_ranks_are_inverse(sizes: tuple[int, int, int]) -> None:
    tensor, pipe, data = sizes
    layout = Layout(world_size=tensor * pipe * data, tensor_size=tensor, pipe_size=pipe)
    assert layout.data_size == data
    seen = set()
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank_at(pipe=at.pipe, data=at.data, tensor=at.tensor) == rank
        seen.add(at)
    assert len(seen) == layout.world_size


@pytest.mark.parametrize("kind", ["tensor", "data", "pipe"])
def test_groups_divide_the_world_and_vary_in_one_axis(kind: str) -> None:
    layout = Layout(world_size=24, tensor_size=2, pipe_size=3)
    groups = getattr(layout, f"{kind}_groups")()
    assert sorted(rank for group in groups for rank in group) == list(range(24))
    for group in groups:
        assert [getattr(layout.coordinates(rank), kind) for rank in group] == list(
            range(getattr(layout, f"{kind}_size"))
        )
        for other in {"tensor", "data", "pipe"} - {kind}:
            assert len({getattr(layout.coordinates(rank), other) for rank in group}) == 1


def test_agrees_with_deepspeeds_topology() -> None:
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = topology.PipeModelDataParallelTopology(num_pp=2, num_mp=4, num_dp=3)
    ours = Layout(world_size=24, tensor_size=4, pipe_size=2)
    for rank in range(24):
        there, here = theirs.get_coord(rank), ours.coordinates(rank)
        assert (there.pipe, there.data, there.model) == (here.pipe, here.data, here.tensor)


def test_thousands_of_ranks_need_no_process() -> None:
    layout = Layout(world_size=4096, tensor_size=8, pipe_size=16)
    last = Topology(layout=layout, rank=4095)
    assert (last.stage, last.data_rank, last.tensor_rank) == (15, 31, 7)
    assert last.is_last_stage
    assert not last.is_first_stage
    assert len(layout.data_groups()) == 128


def test_single() -> None:
    topology = Topology.single()
    assert (topology.tensor_size, topology.data_size, topology.pipe_size) == (1, 1, 1)
    assert topology.is_first_stage
    assert topology.is_last_stage
    assert Topology.create(Layout(world_size=1), 0) == topology


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 6, "tensor_size": 4}, "6 ranks cannot be arranged"),
        ({"world_size": 0}, "world_size is 0"),
        ({"world_size": 2, "pipe_size": -1}, "pipe_size is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**sizes)


def test_ranks_outside_the_world_are_refused() -> None:
    layout = Layout(world_size=4, tensor_size=2)
    with pytest.raises(ValueError, match="rank 4"):
        layout.coordinates(4)
    with pytest.raises(ValueError, match="tensor coordinate 2"):
        layout.rank_at(pipe=0, data=0, tensor=2)


def test_groups_need_an_initialised_process_group() -> None:
    with pytest.raises(RuntimeError, match="initialised"):
        Topology.create(Layout(world_size=2, tensor_size=2), 0)
