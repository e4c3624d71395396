"""What is measured before a step: who is asked, which windows are read, which are shared out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import runs

from data_sampling_utils import Decision, Signal
from megatron.data.domain import open_domain
from megatron.data.plan import Plan
from megatron.data.rows import RowReader
from megatron.errors import ConfigError
from megatron.signals.foresight import Foresight
from megatron.signals.gradients import spread
from megatron.signals.held_out_batch import ordinals

LENGTH = 16


class Answers:
    """Counts how often it is asked."""

    def __init__(self, **fields: Any) -> None:
        self.fields, self.asked = fields, 0

    def measure(self, planned: Any) -> dict[str, Any]:
        self.asked += 1
        return self.fields


def planned(*asked: Signal) -> Any:
    plan = Plan(
        step=1,
        domain=np.array([0, 2, 0, 0], dtype=np.int32),
        epoch=np.zeros(4, dtype=np.int64),
        sample=np.arange(4),
        weights=np.full(3, 1 / 3),
    )
    decision = Decision(sampling_weights=plan.weights, measure=frozenset(asked))
    return SimpleNamespace(plan=plan, decision=decision, samples_seen=plan.counts())


def test_only_what_is_asked_for_is_measured_and_once() -> None:
    losses, valid = Answers(loss_sum=1, excess_loss=2), Answers(batch_valid_loss=3)
    foresight = Foresight(
        {Signal.LOSS: losses, Signal.EXCESS_LOSS: losses, Signal.BATCH_VALID_LOSS: valid}
    )
    fields = foresight.measure(planned(Signal.LOSS, Signal.EXCESS_LOSS, Signal.LEARNING_RATE))
    assert fields.pop("sample_count").tolist() == [3, 0, 1]
    assert fields == {"loss_sum": 1, "excess_loss": 2}
    assert (losses.asked, valid.asked) == (1, 0)


def test_what_nobody_measures_is_named() -> None:
    with pytest.raises(ConfigError, match="'gradient_alignment'"):
        Foresight({}).measure(planned(Signal.GRADIENT_ALIGNMENT))


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.1, 1.0, 7.0]), min_size=1, max_size=8).filter(any),
    st.integers(1, 64),
)
def test_windows_are_shared_out_by_weight_and_none_that_counts_is_left_out(
    weights: list[float], samples: int
) -> None:
    given_weights = np.array(weights)
    counts = spread(given_weights, samples)
    positive = given_weights > 0
    assert counts.sum() == max(samples, positive.sum())
    assert (counts[positive] >= 1).all()
    assert (counts[~positive] == 0).all()
    exact = given_weights / given_weights.sum() * samples
    if (exact[positive] >= 1).all():
        assert (np.abs(counts - exact) <= 1).all()


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_ordinals_count_equal_values_before(values: list[int]) -> None:
    expected = [values[:place].count(value) for place, value in enumerate(values)]
    assert ordinals(np.array(values)).tolist() == expected


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    runs.make_data(folder, documents=20)
    opened = [
        open_domain(name, [str(folder / name)], seq_length=LENGTH, seed=1, epoch_offset=False)
        for name in runs.DOMAINS
    ]
    yield opened
    for domain in opened:
        domain.close()


def test_rows_are_read_in_the_order_they_are_asked_for(domains: Any) -> None:
    reader = RowReader([domains[0], None, domains[2]], seq_length=LENGTH, rows=2, vocab_size=120)
    domain = np.array([2, 0, 0, 2, 2])
    epoch, sample = np.array([0, 0, 1, 1, 0]), np.array([3, 0, 1, 2, 0])
    batches = list(reader.read(domain, epoch, sample))
    assert [len(batch.tokens) for batch in batches] == [2, 2, 1]
    row = 0
    for batch in batches:
        assert np.asarray(batch.sample_weight).tolist() == [1.0] * len(batch.tokens)
        for place in range(len(batch.tokens)):
            window = domains[domain[row]].sample(int(epoch[row]), int(sample[row]))
            assert np.asarray(batch.tokens[place]).tolist() == window[:-1].tolist()
            assert np.asarray(batch.targets[place]).tolist() == window[1:].tolist()
            assert int(batch.domain_ids[place]) == domain[row]
            row += 1
    with pytest.raises(ValueError, match="domain 1 has no data"):
        list(reader.read(np.array([1]), np.array([0]), np.array([0])))


def test_positions_go_on_through_the_passes(domains: Any) -> None:
    reader = RowReader(domains, seq_length=LENGTH, rows=2)
    count = domains[1].num_windows(0)
    position = np.array([0, count - 1, count, 3 * count + 2])
    epoch, sample = reader.wrapped(np.full(4, 1), position)
    assert epoch.tolist() == [0, 0, 1, 3]
    assert sample.tolist() == [0, count - 1, 0, 2]


def test_rows_mask_and_check_as_training_does(domains: Any, tmp_path: Path) -> None:
    reader = RowReader(domains, seq_length=LENGTH, rows=4, masked_token=runs.EOD)
    (batch,) = reader.read(np.zeros(4, dtype=int), np.zeros(4, dtype=int), np.arange(4))
    masked = np.asarray(batch.loss_mask) == 0
    assert masked.any()
    assert (masked == (np.asarray(batch.tokens) == runs.EOD)).all()
    small = RowReader(domains, seq_length=LENGTH, rows=4, vocab_size=5)
    with pytest.raises(Exception, match="outside the vocabulary"):
        list(small.read(np.zeros(1, dtype=int), np.zeros(1, dtype=int), np.zeros(1, dtype=int)))
