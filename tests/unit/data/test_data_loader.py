"""Micro-batches: right rows, right weights, errors where the caller sees them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.batch import MicroBatch, make_micro_batch
from megatron.data.domain import Domain, open_domain
from megatron.data.loader import Loader
from megatron.data.plan import Plan
from megatron.data.reader import TokenReader
from megatron.data.sampler import Sampler
from megatron.data.validation import ValidationSet
from megatron.data.writer import TokenWriter
from megatron.errors import DataError, RunError

SEQ = 16
EOD = 0


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    """Four domains whose documents differ in length, hence in the share of end tokens."""
    folder = tmp_path_factory.mktemp("loader")
    random = np.random.default_rng(0)
    opened = []
    for place, (mean, dtype) in enumerate(
        [(3, "uint16"), (40, "int32"), (9, "uint16"), (200, "uint8")]
    ):
        with TokenWriter(folder / str(place), dtype) as writer:
            for _ in range(600 // mean + 2):
                words = random.integers(1, 200, random.integers(1, 2 * mean))
                writer.add(np.append(words, EOD))
        opened.append(open_domain(f"d{place}", [folder / str(place)], seq_length=SEQ, seed=3))
    return opened


def make_plan(domains: Sequence[Domain], size: int, steps: int = 1, seed: int = 3) -> Plan:
    names = [domain.name for domain in domains]
    sampler = Sampler(names, domains, seed=seed, global_batch=size)
    for step in range(steps):
        plan = sampler.plan(step, [0.4, 0.3, 0.2, 0.1])
    return plan


def batches(
    domains: Sequence[Domain],
    plan: Plan,
    layout: tuple[int, int, int],
    loss_weights: Sequence[float] | None = None,
    **options: object,
) -> list[list[MicroBatch]]:
    """Load on every data-parallel rank, counts summed as a collective would; [rank][micro]."""
    micro_batch, accumulation, data_size = layout
    counts, meet = [np.zeros(0)] * data_size, threading.Barrier(data_size, timeout=30)
    found: list[list[MicroBatch]] = [[]] * data_size

    def run(rank: int) -> None:
        def reduce(own: np.ndarray) -> np.ndarray:
            counts[rank] = own
            meet.wait()
            total = np.sum(counts, axis=0)
            meet.wait()
            return total

        loader = Loader(
            domains,
            seq_length=SEQ,
            micro_batch=micro_batch,
            accumulation=accumulation,
            data_rank=rank,
            data_size=data_size,
            reduce_counts=reduce,
            **options,
        )
        found[rank] = list(loader.load(plan, loss_weights))
        loader.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(data_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(part) == accumulation for part in found)
    return found


def in_slot_order(found: list[list[MicroBatch]], field: str) -> np.ndarray:
    """The rows of the global batch, in the order of its slots."""
    accumulation = len(found[0])
    return np.concatenate(
        [np.asarray(getattr(rank[m], field)) for m in range(accumulation) for rank in found]
    )


LAYOUTS = [(12, 1, 1), (3, 4, 1), (1, 12, 1), (2, 2, 3), (1, 1, 12), (6, 1, 2), (1, 6, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_rows_are_the_plan_s_samples(
    domains: list[Domain], layout: tuple[int, int, int], prefetch: bool
) -> None:
    plan = make_plan(domains, 12, steps=4)
    found = batches(domains, plan, layout, prefetch=prefetch)
    samples = [
        domains[d].sample(int(e), int(s))
        for d, e, s in zip(plan.domain, plan.epoch, plan.sample, strict=True)
    ]
    assert (in_slot_order(found, "tokens") == np.stack([s[:-1] for s in samples])).all()
    assert (in_slot_order(found, "targets") == np.stack([s[1:] for s in samples])).all()
    assert (in_slot_order(found, "domain_ids") == plan.domain).all()
    assert (in_slot_order(found, "loss_mask") == 1).all()
    one = found[0][0]
    kinds = {
        name: np.asarray(value).dtype for name, value in vars(one).items() if value is not None
    }
    assert [str(kind) for kind in kinds.values()] == [
        "int64",
        "int64",
        "float32",
        "int64",
        "float32",
    ]
    assert all(np.asarray(getattr(one, name)).flags.c_contiguous for name in kinds)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    masked=st.booleans(),
    loss_weights=st.one_of(
        st.none(), st.lists(st.floats(0, 5), min_size=4, max_size=4).filter(any)
    ),
    steps=st.integers(1, 5),
)
def test_the_loss_is_the_weighted_mean_over_the_global_batch(
    domains: list[Domain],
    layout: tuple[int, int, int],
    masked: bool,
    loss_weights: list[float] | None,
    steps: int,
) -> None:
    """Mean over micro-batches and ranks of what each computes = one weighted mean."""
    plan = make_plan(domains, 12, steps=steps)
    found = batches(domains, plan, layout, loss_weights, eod_mask_loss=masked, eod_id=EOD)
    per_token = np.random.default_rng(1).random((200, 200))

    def token_loss(batch: MicroBatch) -> np.ndarray:
        return per_token[batch.tokens, batch.targets]

    parts = [
        float((b.sample_weight * (b.loss_mask * token_loss(b)).sum(axis=1)).sum())
        for rank in found
        for b in rank
    ]
    weight = np.ones(4) if loss_weights is None else np.array(loss_weights)
    above = below = 0.0
    for d, e, s in zip(plan.domain, plan.epoch, plan.sample, strict=True):
        window = domains[d].sample(int(e), int(s))
        counts = (window[:-1] != EOD) if masked else np.ones(SEQ)
        above += weight[d] * float((counts * per_token[window[:-1], window[1:]]).sum())
        below += weight[d] * float(counts.sum())
    expected = above / below if below else 0.0
    assert np.mean(parts) == pytest.approx(expected, rel=1e-6)


def test_nothing_to_learn_from_is_zero_not_nan(domains: list[Domain]) -> None:
    plan = make_plan(domains, 12)
    found = batches(domains, plan, (12, 1, 1), [0.0] * 4)
    assert (in_slot_order(found, "sample_weight") == 0).all()


@pytest.mark.option("eod_mask_loss")
def test_the_mask_is_where_the_end_token_is_the_input(domains: list[Domain]) -> None:
    plan = make_plan(domains, 12)
    found = batches(domains, plan, (12, 1, 1), eod_mask_loss=True, eod_id=EOD)
    batch = found[0][0]
    assert ((np.asarray(batch.tokens) == EOD) == (np.asarray(batch.loss_mask) == 0)).all()
    assert (np.asarray(batch.loss_mask) == 0).sum() > 5


def test_errors_surface_in_the_caller(tmp_path: Path, domains: list[Domain]) -> None:
    with TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add(np.arange(SEQ * 40))
    domain = open_domain("short", [tmp_path / "a"], seq_length=SEQ, seed=0)
    plan = Sampler(["short"], [domain], seed=0, global_batch=32).plan(0, [1.0])
    os.truncate(tmp_path / "a.bin", 100)
    for prefetch in (True, False):
        for options in ({}, {"eod_mask_loss": True, "eod_id": 0}):
            loader = single([domain], micro_batch=2, accumulation=16, prefetch=prefetch, **options)
            with pytest.raises(DataError, match="shrank"):
                list(loader.load(plan))
            loader.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_ids_outside_the_vocabulary_are_refused(domains: list[Domain], prefetch: bool) -> None:
    plan = make_plan(domains, 12)
    loader = single(domains, micro_batch=12, prefetch=prefetch, vocab_size=150)
    with pytest.raises(DataError, match=r"domain 'd\d': token id 1\d\d is outside .* 150"):
        list(loader.load(plan))
    assert len(list(single(domains, micro_batch=12, vocab_size=200).load(plan))) == 1


def single(domains: Sequence[Domain], **options: object) -> Loader:
    given = {"accumulation": 1, "data_rank": 0, "data_size": 1} | options
    return Loader(domains, seq_length=SEQ, **given)


def test_an_abandoned_step_neither_blocks_nor_leaks_into_the_next(domains: list[Domain]) -> None:
    loader = single(domains, micro_batch=1, accumulation=12)
    plan, other = make_plan(domains, 12), make_plan(domains, 12, steps=2)
    for _ in range(20):
        abandoned = loader.load(plan)
        next(abandoned)
    whole = list(loader.load(other))
    assert [int(batch.domain_ids[0]) for batch in whole] == other.domain.tolist()
    loader.close()
    loader.close()


def test_two_steps_may_be_in_the_making_at_once(domains: list[Domain]) -> None:
    """With a lag, the next step is read while this one runs."""
    loader = single(domains, micro_batch=2, accumulation=6)
    plans = [make_plan(domains, 12, steps=1), make_plan(domains, 12, steps=2)]
    ahead: list[Iterator[MicroBatch]] = [loader.load(plan) for plan in plans]
    for plan, step in zip(plans, ahead, strict=True):
        found = np.concatenate([batch.domain_ids for batch in step])
        assert (found == plan.domain).all()
    loader.close()


def test_reading_begins_before_the_first_micro_batch_is_asked_for(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, begun = [], threading.Event()
    monkeypatch.setattr(TokenReader, "will_need", lambda self, start, stop: told.append(start))
    real = TokenReader.read_into

    def reading(self: TokenReader, out: np.ndarray, start: int) -> None:
        assert len(told) == 12  # of every window the kernel was told before any was read
        begun.set()
        real(self, out, start)

    monkeypatch.setattr(TokenReader, "read_into", reading)
    loader = single(domains, micro_batch=2, accumulation=6)
    step = loader.load(make_plan(domains, 12))
    assert begun.wait(20)
    assert len(list(step)) == 6
    loader.close()


def test_prefetch_tells_of_the_windows_of_the_next_step(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [domain.name for domain in domains]
    sampler = Sampler(names, domains, seed=3, global_batch=12)
    weights = [0.4, 0.3, 0.2, 0.1]
    sampler.plan(0, weights)
    told: set[tuple[str, int]] = set()
    monkeypatch.setattr(
        TokenReader, "will_need", lambda self, start, stop: told.add((self.prefix, start))
    )
    for rank in range(3):  # the ranks of a machine divide the windows among them
        before = len(told)
        loader = single(domains, micro_batch=2, accumulation=2, data_rank=rank, data_size=3)
        loader.prefetch_for(sampler, weights)
        loader.close()
        assert len(told) - before <= 12 // 3 + 4
    plan = sampler.plan(1, weights)
    for d, e, s in zip(plan.domain, plan.epoch, plan.sample, strict=True):
        reader, start = domains[d].locate(int(e), int(s))
        assert (reader.prefix, start) in told


def test_options_are_checked(domains: list[Domain]) -> None:
    for options, message in (
        ({"seq_length": 8}, "seq_length"),
        ({"data_rank": 2, "data_size": 2}, "data_rank"),
        ({"eod_mask_loss": True}, "eod_id"),
        ({"eod_mask_loss": True, "eod_id": 0, "data_size": 2}, "reduce_counts"),
    ):
        given = {"seq_length": SEQ, "accumulation": 1, "data_rank": 0, "data_size": 1}
        with pytest.raises(ValueError, match=message):
            Loader(domains, micro_batch=1, **(given | options))
    with pytest.raises(ValueError, match="does not divide"):
        single(domains, micro_batch=5).load(make_plan(domains, 12))


def test_pinned_memory_without_a_device_is_refused(domains: list[Domain]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RunError, match="pin_memory"):
        single(domains, micro_batch=12, pin_memory=True)


def test_pinned_batches_are_tensors_of_the_same_numbers(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no device, with ordinary memory in the place of pinned memory."""
    torch = pytest.importorskip("torch")
    real = torch.empty

    def ordinary(*arguments: object, pin_memory: bool, **options: object) -> object:
        assert pin_memory
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "empty", ordinary)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = make_plan(domains, 12)
    options = {"micro_batch": 2, "accumulation": 6, "eod_mask_loss": True, "eod_id": EOD}
    plain = single(domains, **options).load(plan)
    pinned = single(domains, pin_memory=True, **options).load(plan)
    for one, other in zip(plain, pinned, strict=True):
        for name in vars(one).keys() - {"reference"}:
            assert isinstance(getattr(other, name), torch.Tensor)
            assert (getattr(other, name).numpy() == getattr(one, name)).all()


@pytest.mark.gpu
def test_pinned_batches_copy_asynchronously_and_are_equal(domains: list[Domain]) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plan = make_plan(domains, 12)
    plain = list(single(domains, micro_batch=2, accumulation=6).load(plan))
    pinned = single(domains, micro_batch=2, accumulation=6, pin_memory=True).load(plan)
    for one, other in zip(plain, pinned, strict=True):
        for name in vars(one).keys() - {"reference"}:
            tensor = getattr(other, name)
            assert tensor.is_pinned()
            copied = tensor.to("cuda", non_blocking=True).cpu().numpy()
            assert (copied == getattr(one, name)).all()


def test_torch_takes_the_arrays_without_a_copy(domains: list[Domain]) -> None:
    torch = pytest.importorskip("torch")
    batch = next(single(domains, micro_batch=12).load(make_plan(domains, 12)))
    tensor = torch.as_tensor(batch.tokens)
    assert tensor.data_ptr() == batch.tokens.ctypes.data
    assert tensor.dtype == torch.int64


def test_the_data_package_needs_neither_torch_nor_threads_to_import() -> None:
    import subprocess

    script = "import sys, megatron.data; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.strip() == "[]"


def test_padding_rows_count_for_nothing() -> None:
    batch = make_micro_batch(
        np.arange(5)[None],
        seq_length=4,
        domain_ids=np.zeros(3, dtype=np.int64),
        sample_weight=np.ones(3),
        masked_token=0,
    )
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [0] * 4, [0] * 4]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1], [0] * 4, [0] * 4]
    assert batch.sample_weight.tolist() == [1, 0, 0]


MakeSet = Callable[..., ValidationSet]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 60),
    micro_batch=st.integers(1, 7),
    data_size=st.integers(1, 16),
    which=st.integers(0, 3),
    masked=st.sampled_from([None, EOD]),
)
def test_validation_is_the_same_on_every_layout(
    domains: list[Domain],
    samples: int,
    micro_batch: int,
    data_size: int,
    which: int,
    masked: int | None,
) -> None:
    chosen = ValidationSet(domains[which], samples, 7, masked_token=masked)
    n = min(samples, domains[which].num_windows(0))
    assert chosen.samples == n
    rows: dict[int, tuple[int, ...]] = {}
    total = 0.0
    for rank in range(data_size):
        own = list(chosen.micro_batches(micro_batch, rank, data_size, first_id=100))
        assert len(own) == chosen.num_micro_batches(micro_batch, data_size)
        for place, batch in enumerate(own):
            assert batch.tokens.shape == (micro_batch, SEQ)
            assert (batch.domain_ids < 100 + n).all()
            total += float((batch.sample_weight * batch.loss_mask.sum(axis=1)).sum())
            for row in np.flatnonzero(batch.sample_weight):
                slot = (place * data_size + rank) * micro_batch + int(row)
                rows[slot] = tuple(batch.tokens[row].tolist())
                assert batch.domain_ids[row] == 100 + slot
    # The oracle: one rank, one row at a time.
    alone = list(chosen.micro_batches(1, 0, 1))
    assert [rows[slot] for slot in range(n)] == [tuple(b.tokens[0].tolist()) for b in alone]
    assert total == sum(float(b.loss_mask.sum()) for b in alone)
    assert len(set(chosen.windows.tolist())) == n


def test_validation_windows_are_nested_and_seeded(domains: list[Domain]) -> None:
    """A larger set holds the smaller one, so results of both can be compared."""
    small, large = (ValidationSet(domains[0], n, 7) for n in (10, 20))
    assert large.windows[:10].tolist() == small.windows.tolist()
    assert ValidationSet(domains[0], 10, 8).windows.tolist() != small.windows.tolist()
    assert sorted(ValidationSet(domains[0], 10**6, 7).windows) == list(
        range(domains[0].num_windows(0))
    )
    with pytest.raises(ValueError, match="0 samples"):
        ValidationSet(domains[0], 0, 7)
