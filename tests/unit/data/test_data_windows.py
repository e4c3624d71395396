"""Permutation, windows, splits and domains."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.domain import Domain, open_domain
from megatron.data.permutation import hash_key, permute, permute_one
from megatron.data.reader import TokenReader
from megatron.data.splits import parse_split, split_documents
from megatron.data.windows import WindowGrid
from megatron.errors import ConfigError

MakeDataset = Callable[..., str]
KEYS = st.integers(0, 2**64 - 1)


def order(size: int, key: int) -> list[int]:
    everything = np.arange(size, dtype=np.int64)
    return permute(everything, np.full(size, size), np.full(size, key, dtype=np.uint64)).tolist()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(size=st.integers(1, 3000), key=KEYS)
def test_it_is_a_permutation(size: int, key: int) -> None:
    assert sorted(order(size, key)) == list(range(size))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 2**61), KEYS, st.integers(0, 2**61)), min_size=1))
def test_arrays_and_scalars_agree(cases: list[tuple[int, int, int]]) -> None:
    """Each element under its own size and key, squares and their neighbours among them."""
    cases += [(root * root + by, 5, 7) for root in (3, 2**20, 2**30) for by in (-1, 0, 1)]
    size = np.array([size for size, _, _ in cases], dtype=np.int64)
    key = np.array([key for _, key, _ in cases], dtype=np.uint64)
    index = np.array([at % size for size, _, at in cases], dtype=np.int64)
    expected = [
        permute_one(int(at), int(n), int(k)) for at, n, k in zip(index, size, key, strict=True)
    ]
    assert permute(index, size, key).tolist() == expected


def test_indices_outside_are_refused() -> None:
    for index in (-1, 5):
        with pytest.raises(IndexError):
            permute_one(index, 5, 0)
        with pytest.raises(IndexError):
            permute(np.array([index]), np.array([5]), np.array([0], dtype=np.uint64))


def test_the_order_never_changes() -> None:
    """A released order is a promise: a checkpoint goes on with it under another release."""
    assert order(10, 42) == [9, 2, 6, 1, 3, 8, 7, 5, 0, 4]
    assert permute_one(123456789, 10**12, 2**63 + 5) == 60511459626
    assert hash_key("domain", 1234, "code") == 11142077004728697609


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 16, 50])
def test_every_place_is_equally_likely(size: int) -> None:
    """Chi-square over keys: where each element goes, and where a neighbour follows it."""
    trials = 4000
    seen = np.zeros((size, size))
    pairs = Counter()
    for key in range(trials):
        row = order(size, hash_key(size, key))
        seen[np.arange(size), row] += 1
        pairs[row[0], row[1]] += 1
    chi_square = ((seen - trials / size) ** 2 / (trials / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 6
    expected = trials / (size * (size - 1))
    chi_square = sum(
        (pairs[one, two] - expected) ** 2 / expected
        for one in range(size)
        for two in range(size)
        if one != two
    )
    freedom = size * (size - 1) - 1
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 6


def test_neighbours_do_not_stay_together() -> None:
    row = np.array(order(100_000, 3))
    distance = np.abs(np.diff(row))
    assert abs(distance.mean() / (100_000 / 3) - 1) < 0.02
    assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.02


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    seq_length=st.integers(1, 9),
    data=st.data(),
)
def test_windows_cover_segments(lengths: list[int], seq_length: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, seq_length - 1))
    grid = WindowGrid(lengths=tuple(lengths), seq_length=seq_length)
    windows = grid.epoch(offset)
    places = [windows.locate(window) for window in range(windows.count)]
    for segment, length in enumerate(lengths):
        starts = [start for at, start in places if at == segment]
        most = max(length - 1, 0) // seq_length
        assert all(b - a == seq_length for a, b in itertools.pairwise(starts))
        assert most - len(starts) in (0, 1)
        assert bool(starts) == bool(most)
        if starts:
            assert starts[0] == offset or (most == 1 and starts[0] <= offset)
            assert starts[-1] + seq_length + 1 <= length
            assert length - (starts[-1] + seq_length + 1) < seq_length  # no window left out
    counts = {grid.epoch(other).count for other in range(seq_length)}
    assert grid.fixed_count == (counts.pop() if len(counts) == 1 else None)
    with pytest.raises(IndexError):
        windows.locate(windows.count)


def test_split_strings() -> None:
    assert parse_split("969, 30, 1") == pytest.approx((0.969, 0.03, 0.001))
    assert parse_split("9/1") == pytest.approx((0.9, 0.1, 0.0))
    assert parse_split("100") == (1.0, 0.0, 0.0)
    for text in ("", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "inf,1", "1;2"):
        with pytest.raises(ConfigError, match="split"):
            parse_split(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    shares=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
)
def test_splits_divide_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shares: list[int]
) -> None:
    from megatron.data.writer import TokenWriter

    prefix = tmp_path_factory.mktemp("split") / "a"
    with TokenWriter(prefix, "uint16") as writer:
        writer.add_many(np.arange(sum(lengths)), lengths)
    with TokenReader(prefix) as reader:
        text = ",".join(map(str, shares))
        parts = [split_documents(reader, text, name) for name in ("train", "valid", "test")]
        assert parts[0].first == 0
        held = [part for part in parts if part.last > part.first]
        for part, after in itertools.pairwise(held):
            assert part.last == after.first
            assert part.stop == after.start
        assert held[-1].last == len(lengths)
        asked, tokens = 0.0, sum(lengths)
        for part, share in zip(parts, shares, strict=True):
            asked += share / sum(shares) * tokens
            assert abs(part.stop - asked) <= max(lengths) / 2 + 1
            assert share or part.first == part.last


@pytest.fixture
def many(dataset: MakeDataset) -> list[str]:
    return [
        dataset("one", [7] * 40),
        dataset("two", [100, 3, 50], first=1000),
        dataset("tiny", [6], first=2000),
        dataset("wide", [90], first=3000, dtype="int32"),
    ]


def windows_read(domain: Domain, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(domain.sample(epoch, i).tolist()) for i in range(domain.num_windows(epoch))]


def test_samples_are_consecutive_tokens_of_one_prefix(many: list[str]) -> None:
    domain = open_domain("d", many, seq_length=8, seed=3)
    for epoch in range(5):
        samples = windows_read(domain, epoch)
        assert all(sample == tuple(range(sample[0], sample[0] + 9)) for sample in samples)
        assert len(set(samples)) == len(samples)
        inputs = [token for sample in samples for token in sample[:-1]]
        assert len(set(inputs)) == len(inputs)  # every token is predicted at most once
        assert len(inputs) >= domain.num_tokens - 4 * 2 * 8


def test_epochs_move_the_cuts_and_reshuffle(many: list[str]) -> None:
    domain = open_domain("d", many, seq_length=8, seed=3)
    assert windows_read(domain, 0) == windows_read(domain, 0)
    assert set(windows_read(domain, 0)) != set(windows_read(domain, 1))
    first_cuts = {min(windows_read(domain, epoch))[0] for epoch in range(60)}
    assert first_cuts == set(range(8))
    kept = open_domain("d", many, seq_length=8, seed=3, epoch_offset=False)
    assert set(windows_read(kept, 0)) == set(windows_read(kept, 1))
    assert windows_read(kept, 0) != windows_read(kept, 1)
    assert kept.fixed_windows == kept.num_windows(5)


@pytest.mark.option("seq_length")
def test_the_order_belongs_to_seed_and_name(many: list[str]) -> None:
    def first(name: str, seed: int) -> list[tuple[int, ...]]:
        return windows_read(open_domain(name, many, seq_length=8, seed=seed, epoch_offset=False), 0)

    assert first("d", 3) == first("d", 3)
    assert first("d", 3) != first("e", 3)
    assert first("d", 3) != first("d", 4)


def test_fingerprint_tells_content_split_seed_and_length(many: list[str]) -> None:
    base = {"seq_length": 8, "seed": 3}
    prints = [
        open_domain(name, paths, **(base | options)).fingerprint()
        for name, paths, options in [
            ("d", many, {}),
            ("e", many, {}),
            ("d", many[::-1], {}),
            ("d", many[:2], {}),
            ("d", many, {"seed": 4}),
            ("d", many, {"seq_length": 7}),
            ("d", many, {"epoch_offset": False}),
            ("d", many[:2], {"split": ("9,1", "train")}),
            ("d", many[:2], {"split": ("8,2", "train")}),
        ]
    ]
    assert len(set(prints)) == len(prints)
    assert open_domain("d", many, **base).fingerprint() == prints[0]


def test_a_split_never_shares_a_token(many: list[str]) -> None:
    seen: list[set[int]] = []
    for part in ("train", "valid"):
        domain = open_domain("d", many[:1], seq_length=8, seed=0, split=("7,3", part))
        tokens = {t for epoch in range(9) for s in windows_read(domain, epoch) for t in s}
        seen.append(tokens)
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]
    assert max(seen[0]) < min(seen[1]) == 28 * 7


def test_document_starts_inside_a_sample(many: list[str]) -> None:
    domain = open_domain("d", many[:1], seq_length=8, seed=3)
    for index in range(domain.num_windows(0)):
        first = int(domain.sample(0, index)[0])
        expected = [at for at in range(9) if (first + at) % 7 == 0]
        assert domain.document_starts(0, index).tolist() == expected


def test_a_domain_of_one_window(dataset: MakeDataset) -> None:
    domain = open_domain("d", [dataset("a", [9])], seq_length=8, seed=0)
    assert domain.fixed_windows == 1
    assert all(windows_read(domain, epoch) == [tuple(range(9))] for epoch in range(20))
    roomy = open_domain("d", [dataset("b", [12])], seq_length=8, seed=0)
    assert roomy.fixed_windows == 1
    assert {windows_read(roomy, epoch)[0][0] for epoch in range(60)} == {0, 1, 2, 3}


def test_bytes_per_token_needs_every_sidecar(many: list[str]) -> None:
    assert open_domain("d", many, seq_length=8, seed=0).bytes_per_token is None
