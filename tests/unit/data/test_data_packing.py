"""Windows of whole documents, label datasets, and what the loss counts of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.batch import MicroBatch
from megatron.data.domain import Domain, open_domain
from megatron.data.loader import Loader
from megatron.data.packing import document_windows
from megatron.data.sampler import Sampler
from megatron.data.validation import ValidationSet
from megatron.data.writer import TokenWriter
from megatron.errors import DataError

SEQ = 16


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """120 documents of 0 to 40 tokens; a token is 1 + its place in the stream."""
    lengths = np.random.default_rng(1).integers(0, 41, 120)
    with TokenWriter(tmp_path / "text", "int32") as writer:
        writer.add_many(np.arange(1, lengths.sum() + 1), lengths)
    return str(tmp_path / "text")


def labelled(prefix: str, name: str, trained: Callable[[np.ndarray], np.ndarray]) -> str:
    """Write labels: the token where ``trained`` of its number says so, else -100."""
    domain = open_domain("x", [prefix], seq_length=1, seed=0)
    reader = domain.sources[0].reader
    tokens = reader.read(0, reader.num_tokens)
    path = str(Path(prefix).with_name(name))
    with TokenWriter(path, "int32") as writer:
        labels = np.where(trained(tokens), tokens, -100)
        writer.add_many(labels, reader.document_sizes(0, reader.num_documents))
    return path


def naive_packs(sizes: list[int], how: str, chop: bool) -> list[tuple[int, int]]:
    """Return (first token, tokens) of every window, one document at a time."""
    limit, found, start, held = SEQ + 1, [], 0, 0
    position = 0
    for size in sizes:
        if how == "unpacked" or held + size > limit:
            found.append((start, held))
            start, held = position, 0
        held += size
        position += size
    found.append((start, held))
    kept = [(at, n) for at, n in found if n >= 2 and (chop or n <= limit)]
    return [(at, min(n, limit)) for at, n in kept]


@pytest.mark.option("pack_impl")
@pytest.mark.parametrize("how", ["pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("chop", [True, False])
def test_windows_are_those_of_a_loop_over_documents(how: Any, chop: bool) -> None:
    random = np.random.default_rng(5)
    for number in range(60):
        sizes = random.integers(0, 1 + number, random.integers(0, 50)).astype(np.int32)
        found = document_windows(
            [sizes, sizes[:3]], seq_length=SEQ, pack_impl=how, allow_chopped=chop
        )
        for segment, part in enumerate((sizes, sizes[:3])):
            pairs = zip(
                found.starts[segment].tolist(), found.lengths[segment].tolist(), strict=False
            )
            assert list(pairs) == naive_packs(part.tolist(), how, chop)
        assert found.count == found.ends[-1] == sum(map(len, found.starts))
        for window in range(found.count):
            segment, start = found.locate(window)
            place = window - (found.ends[0] if segment else 0)
            assert start == found.starts[segment][place]
            assert found.length(window) == found.lengths[segment][place]


def batches(domains: list[Domain], *, ranks: int = 1, **options: Any) -> list[MicroBatch]:
    """Return the micro-batches of a step of 12 rows of every rank, counts summed by hand."""
    sampler = Sampler([d.name for d in domains], domains, seed=3, global_batch=12)
    plan = sampler.plan(1, np.ones(len(domains)))
    total = np.zeros(len(domains), dtype=np.int64)
    for domain, epoch, sample in zip(plan.domain, plan.epoch, plan.sample, strict=True):
        place = domains[domain]._sample_place(int(epoch), int(sample))
        count = place.stop - place.start - 1
        if place.labels is not None:
            count = int((place.labels.read(place.start + 1, place.stop) >= 0).sum())
        total[domain] += count
    found = []
    for rank in range(ranks):
        loader = Loader(
            domains,
            seq_length=SEQ,
            micro_batch=2,
            accumulation=6 // ranks,
            data_rank=rank,
            data_size=ranks,
            reduce_counts=(lambda own: total) if ranks > 1 else None,
            **options,
        )
        found += list(loader.load(plan))
        loader.close()
    return found


@pytest.mark.option("pack_impl")
@pytest.mark.parametrize("how", ["pack_until_overflow", "unpacked"])
def test_every_document_is_read_once_an_epoch_and_padding_never_counts(
    prefix: str, how: Any
) -> None:
    domain = open_domain("a", [prefix], seq_length=SEQ, seed=3, pack_impl=how)
    reader = domain.sources[0].reader
    assert domain.fixed_windows == domain.num_windows(0) == domain.num_windows(7)
    seen: list[int] = []
    for sample in range(domain.num_windows(1)):
        tokens = domain.sample(1, sample)
        assert len(tokens) == SEQ + 1
        own = tokens[tokens > 0]
        assert (np.diff(own) == 1).all()
        starts = domain.document_starts(1, sample)
        assert starts[0] == 0, "a window starts with a document"
        assert how == "pack_until_overflow" or len(starts) <= 1 + (own.size < SEQ + 1)
        seen += own.tolist()
    sizes = reader.document_sizes(0, reader.num_documents)
    least = 0 if how == "pack_until_overflow" else 2
    expected = np.minimum(sizes[sizes >= least], SEQ + 1).sum()
    assert len(seen) == len(set(seen)) >= expected - 2
    batch = batches([domain])
    rows = [(b.tokens[i], b.targets[i], b.loss_mask[i]) for b in batch for i in range(2)]
    assert any((mask == 0).any() for _, _, mask in rows)
    for tokens, targets, mask in rows:
        assert (mask == (targets > 0)).all()
        counted = mask > 0
        assert (targets[counted] == tokens[counted] + 1).all()
    total = sum((b.loss_mask.sum(axis=1) * b.sample_weight).sum() for b in batch)
    assert total == pytest.approx(6)  # micro-batches: their mean is the mean over the tokens


@pytest.mark.option("allow_chopped")
def test_chopped_documents_are_cut_off_or_left_out(prefix: str) -> None:
    chopped, whole = (
        open_domain("a", [prefix], seq_length=SEQ, seed=3, pack_impl="unpacked", allow_chopped=chop)
        for chop in (True, False)
    )
    sizes = chopped.sources[0].reader.document_sizes(0, 120)
    assert chopped.num_windows(0) == (sizes >= 2).sum()
    assert whole.num_windows(0) == ((sizes >= 2) & (sizes <= SEQ + 1)).sum()
    assert chopped.fingerprint() != whole.fingerprint()
    short = open_domain("a", [prefix], seq_length=SEQ, seed=3)
    assert short.fingerprint() != chopped.fingerprint()


@pytest.mark.parametrize("how", ["packed", "pack_until_overflow"])
def test_only_labelled_tokens_are_trained_on(prefix: str, how: Any) -> None:
    labels = labelled(prefix, "labels", lambda tokens: tokens % 3 == 0)
    domain = open_domain("a", [prefix], seq_length=SEQ, seed=3, labels=[labels], pack_impl=how)
    batch = batches([domain])
    for part in batch:
        counted = part.loss_mask > 0
        assert counted.any()
        assert (part.targets[counted] % 3 == 0).all()
        assert (part.targets[counted] == part.tokens[counted] + 1).all()
        assert (part.targets >= 0).all()
    total = sum((b.loss_mask.sum(axis=1) * b.sample_weight).sum() for b in batch)
    assert total == pytest.approx(6)
    split = batches([domain], ranks=3)
    assert sum((b.loss_mask.sum(axis=1) * b.sample_weight).sum() for b in split) == (
        pytest.approx(6)
    )
    plain = open_domain("a", [prefix], seq_length=SEQ, seed=3, pack_impl=how)
    assert plain.fingerprint() != domain.fingerprint()
    held = next(ValidationSet(domain, 4, 0).micro_batches(4, 0, 1))
    assert (held.targets[held.loss_mask > 0] % 3 == 0).all()
    assert (held.loss_mask == 0).any()


def test_labels_may_differ_from_the_text(prefix: str, tmp_path: Path) -> None:
    domain = open_domain("a", [prefix], seq_length=SEQ, seed=3)
    reader = domain.sources[0].reader
    with TokenWriter(tmp_path / "other", "int32") as writer:
        sizes = reader.document_sizes(0, reader.num_documents)
        writer.add_many(np.full(reader.num_tokens, 7), sizes)
    taught = open_domain("a", [prefix], seq_length=SEQ, seed=3, labels=[str(tmp_path / "other")])
    assert all((part.targets == 7).all() for part in batches([taught]))


def test_labels_of_other_documents_are_refused(prefix: str, tmp_path: Path) -> None:
    sizes = (
        open_domain("a", [prefix], seq_length=1, seed=0).sources[0].reader.document_sizes(0, 120)
    )
    swapped = sizes.copy()
    place = int(np.argmax(sizes[:-1] != sizes[1:]))
    swapped[place : place + 2] = swapped[place : place + 2][::-1]
    cases: list[tuple[str, Any, str, str]] = [
        ("fewer", sizes[:-1], "int32", "documents of"),
        ("swapped", swapped, "int32", f"document {place} has"),
        ("narrow", sizes, "uint16", "-100"),
    ]
    for name, lengths, dtype, message in cases:
        with TokenWriter(tmp_path / name, dtype) as writer:
            writer.add_many(np.ones(int(lengths.sum()), dtype=np.int64), lengths)
        with pytest.raises(DataError, match=message):
            open_domain("a", [prefix], seq_length=SEQ, seed=3, labels=[str(tmp_path / name)])
    with pytest.raises(DataError, match="2 paths of labels for 1"):
        open_domain("a", [prefix], seq_length=SEQ, seed=3, labels=["a", "b"])
    big = labelled(prefix, "big", lambda tokens: tokens > 0)
    domain = open_domain("a", [prefix], seq_length=SEQ, seed=3, labels=[big])
    with pytest.raises(DataError, match="token id"):
        batches([domain], vocab_size=5)


def test_no_document_long_enough_is_an_error(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "tiny", "int32") as writer:
        writer.add_many(np.arange(30), [1] * 10 + [20])
    with pytest.raises(DataError, match="allow_chopped: true"):
        open_domain(
            "a",
            [tmp_path / "tiny"],
            seq_length=8,
            seed=0,
            pack_impl="unpacked",
            allow_chopped=False,
        )


@pytest.mark.option("curriculum_learning")
def test_a_curriculum_cuts_rows_and_counts_what_is_left(prefix: str) -> None:
    domain = open_domain("a", [prefix], seq_length=SEQ, seed=3)
    long, short = batches([domain]), batches([domain], lengths=lambda step: 4 if step == 1 else SEQ)
    for whole, cut in zip(long, short, strict=True):
        assert cut.tokens.shape == cut.targets.shape == cut.loss_mask.shape == (2, 4)
        assert (cut.tokens == whole.tokens[:, :4]).all()
        assert (cut.targets == whole.targets[:, :4]).all()
    total = sum((b.loss_mask.sum(axis=1) * b.sample_weight).sum() for b in short)
    assert total == pytest.approx(6)
