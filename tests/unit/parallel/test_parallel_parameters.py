"""Parameters and their division; randomness from names."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.parallel import Layout, Topology
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.partition import Partition
from megatron.parallel.rng import digest, generator


def _normal(shape: tuple[int, ...], source: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(source.standard_normal(shape, dtype=np.float32))


def _scope(ranks: int = 1, rank: int = 0, **options: object) -> ParameterScope:
    layout = Layout(world_size=ranks, tensor_size=ranks)
    return ParameterScope(seed=1, topology=Topology(layout=layout, rank=rank), **options)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    ranks=st.integers(1, 4),
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dim=st.integers(0, 1),
)
def test_parts_join_to_the_whole(ranks: int, blocks: list[int], dim: int) -> None:
    partition = Partition(dim=dim, blocks=tuple(block * ranks for block in blocks))
    shape = [3, 3]
    shape[dim] = sum(partition.blocks)
    full = torch.arange(float(np.prod(shape))).view(shape)
    parts = [partition.part(full, rank, ranks) for rank in range(ranks)]
    assert all(part.shape[dim] == sum(blocks) for part in parts)
    assert torch.equal(partition.join(parts), full)


def test_each_rank_holds_its_share_of_every_block() -> None:
    partition = Partition(dim=0, blocks=(4, 2))
    full = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0]])
    assert partition.part(full, 0, 2).flatten().tolist() == [0.0, 1.0, 10.0]
    assert partition.part(full, 1, 2).flatten().tolist() == [2.0, 3.0, 11.0]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(true=st.integers(1, 12), ranks=st.integers(1, 4), unit=st.integers(1, 5))
def test_padding_is_zero_and_the_true_rows_know_nothing_of_it(
    true: int, ranks: int, unit: int
) -> None:
    rows = -(-true // (unit * ranks)) * unit * ranks
    partition = Partition(dim=0, blocks=(rows,), padded_from=true)
    whole = _scope().parameter("weight", (true, 3), _normal).detach()
    parts = [
        _scope(ranks, rank).parameter("weight", (true, 3), _normal, partition).detach()
        for rank in range(ranks)
    ]
    joined = partition.join(parts)
    assert joined.shape == (rows, 3)
    assert torch.equal(partition.unpad(joined), whole)
    assert not joined[true:].any()
    assert torch.equal(partition.pad(whole), joined)
    assert torch.equal(_scope().parameter("weight", (true, 3), _normal, partition), joined)


def test_values_are_the_same_in_every_layout() -> None:
    partition = Partition(dim=0, blocks=(6, 6))
    whole = _scope().child("a").parameter("weight", (12, 5), _normal, partition)
    parts = [
        _scope(3, rank).child("a").parameter("weight", (12, 5), _normal, partition)
        for rank in range(3)
    ]
    assert torch.equal(partition.join([part.detach() for part in parts]), whole.detach())
    assert all(part.partition == partition for part in parts)
    assert all(part.tensor_model_parallel for part in parts)
    assert not hasattr(whole, "tensor_model_parallel")


def test_names_seeds_and_types_matter() -> None:
    one = _scope().child("a").parameter("weight", (4,), _normal)
    other = _scope().child("b").parameter("weight", (4,), _normal)
    assert not torch.equal(one.detach(), other.detach())
    half = _scope(dtype=torch.bfloat16).child("a").parameter("weight", (4,), _normal)
    assert torch.equal(half.detach(), one.detach().bfloat16())
    assert _scope(device="meta").parameter("weight", (4,), _normal).is_meta


def test_a_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"a\.weight has a block of 5 rows.*model_parallel_size 2"
    ):
        _scope(2).child("a").parameter("weight", (5,), _normal, Partition(dim=0, blocks=(5,)))


def test_digest_tells_parts_apart_and_is_the_same_in_every_process() -> None:
    assert len({digest(1, 2), digest(12), digest("1", 2), digest(1, "2"), digest("1, 2")}) == 5
    code = "from megatron.parallel.rng import digest; print(digest(1, 'name'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == digest(1, "name")
    assert generator(1, "a").integers(1 << 60) == generator(1, "a").integers(1 << 60)


def test_known_values_hold() -> None:
    """Initial weights of a seed are part of what a release promises."""
    assert digest(1234, "parameter", "1.attention.dense.weight") % 1000003 == DIGEST
    values = generator(1234, "parameter", "x").standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(values, VALUES, rtol=1e-6)


DIGEST = 294892
VALUES = [-0.6786354184150696, 0.16998891532421112, 0.2135867029428482]
