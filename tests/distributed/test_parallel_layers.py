"""Every parallel layer alone against its dense twin, forward and backward, on 2 and 4 ranks.

One set of ranks runs all cases and returns pairs of tensors, which are compared here.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch

from megatron.parallel import Layout, Topology
from tests.support.dropout_cases import RATE, dropout_facts
from tests.support.gloo import RankFailedError, run_ranks
from tests.support.layer_cases import LAYERS, Bench, Pairs
from tests.support.loss_cases import LOSSES

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""The largest difference, as a share of the twin's largest number."""

LAYOUTS = pytest.mark.parametrize(
    ("world_size", "tensor_size"), [(2, 2), (4, 4), pytest.param(4, 2, marks=pytest.mark.slow)]
)
SEQUENCE = pytest.mark.parametrize("sequence", ["whole", "divided"])


def _rank(rank: int, world_size: int, tensor_size: int) -> dict[tuple[Any, ...], Any]:
    plain = Topology.create(Layout(world_size=world_size, tensor_size=tensor_size), rank)
    found: dict[tuple[Any, ...], Any] = {}
    for sequence in ("whole", "divided"):
        topology = dataclasses.replace(plain, sequence_parallel=sequence == "divided")
        for cases, dtypes in (
            (LAYERS, (torch.float64, torch.float32)),
            (LOSSES, (torch.float32, torch.bfloat16)),
        ):
            for dtype in dtypes:
                bench = Bench(topology=topology, dtype=dtype)
                for name, (case, arguments) in cases.items():
                    found[name, sequence, dtype] = case(bench, *arguments)
        bench = Bench(topology=topology, dtype=torch.float32)
        found["dropout", sequence] = dropout_facts(bench)
    return found


@cache
def _outcome(world_size: int, tensor_size: int) -> list[Any] | RankFailedError:
    try:
        return run_ranks(_rank, world_size, tensor_size)
    except RankFailedError as error:
        return error


def _results(world_size: int, tensor_size: int) -> list[dict[tuple[Any, ...], Any]]:
    """Return what every rank found; ranks that failed are not started for every test again."""
    outcome = _outcome(world_size, tensor_size)
    if isinstance(outcome, RankFailedError):
        raise outcome
    return outcome


def _check(pairs: Pairs, dtype: torch.dtype) -> None:
    for name, (found, expected) in pairs.items():
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        if found.numel():
            error = (found.double() - expected.double()).abs().max().item()
            assert error <= TOLERANCES[dtype] * expected.abs().max().item(), name


@LAYOUTS
@SEQUENCE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_its_dense_twin(
    world_size: int, tensor_size: int, case: str, sequence: str, dtype: torch.dtype
) -> None:
    for result in _results(world_size, tensor_size):
        _check(result[case, sequence, dtype], dtype)


@LAYOUTS
@SEQUENCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_torchs_cross_entropy(
    world_size: int, tensor_size: int, case: str, sequence: str, dtype: torch.dtype
) -> None:
    for result in _results(world_size, tensor_size):
        _check(result[case, sequence, dtype], dtype)


@LAYOUTS
@SEQUENCE
def test_ranks_drop_alike_what_they_hold_alike(
    world_size: int, tensor_size: int, sequence: str
) -> None:
    results = [result["dropout", sequence] for result in _results(world_size, tensor_size)]
    for first, second in combinations(range(world_size), 2):
        same_stream = first // tensor_size == second // tensor_size and sequence == "whole"
        for place, alike in (("hidden", same_stream), ("attention", False)):
            ours, theirs = results[first][place], results[second][place]
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs) == alike, (place, first, second)
    for result in results:
        for place in ("hidden", "attention"):
            assert not torch.equal(result[place], result[f"{place}, later"])
        hidden = result["hidden"]
        assert set(hidden.unique().tolist()) == {0.0, hidden.max().item()}
        assert hidden.max().item() == pytest.approx(1 / (1 - RATE))
        assert (hidden == 0).float().mean().item() == pytest.approx(RATE, abs=0.1)
        # A first token attends to itself alone: with share 1, or dropped.
        first_token = result["attention"][:, 0]
        assert set(first_token.unique().tolist()) == {0.0, first_token.max().item()}
        assert first_token.max().item() == pytest.approx(1 / (1 - RATE))


@LAYOUTS
@SEQUENCE
@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_masks_come_again_where_they_must(
    world_size: int, tensor_size: int, sequence: str, architecture: str
) -> None:
    for result in _results(world_size, tensor_size):
        runs = result["dropout", sequence][architecture]
        for other in ("recomputed", "again"):
            for kept, repeated in zip(runs["kept"], runs[other], strict=True):
                assert torch.equal(kept, repeated), other
        assert not torch.equal(runs["kept"][0], runs["later"][0])
