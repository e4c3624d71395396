"""The ledger: sums by domain, absent domains, and a sample that is not finite."""

from __future__ import annotations

import numpy as np
import torch

from megatron.signals.ledger import Ledger


def test_sums_by_domain_over_micro_batches() -> None:
    generator = np.random.default_rng(0)
    ledger = Ledger(4, torch.device("cpu"))
    losses, counts = np.zeros(4), np.zeros(4)
    for _ in range(5):
        ids = generator.integers(0, 3, 6)  # domain 3 stays absent
        loss, count = generator.random(6) * 100, generator.integers(0, 9, 6).astype(float)
        ledger.add(torch.tensor(loss), torch.tensor(count), torch.tensor(ids))
        np.add.at(losses, ids, loss)
        np.add.at(counts, ids, count)
    totals = ledger.reduce(stop=True)
    np.testing.assert_allclose(totals.loss_sum, losses, rtol=1e-14)
    np.testing.assert_array_equal(totals.token_count, counts)
    assert totals.stop
    assert not totals.skipped
    assert np.isnan(totals.domain_loss[3])
    assert totals.mean_loss == losses.sum() / counts.sum()
    again = ledger.reduce()
    assert not again.stop
    assert not again.token_count.any()


def test_a_sample_that_is_not_finite_spoils_its_own_domain_only() -> None:
    ledger = Ledger(3, torch.device("cpu"))
    ledger.add(torch.tensor([1.0, float("nan"), 3.0]), torch.ones(3), torch.tensor([0, 1, 2]))
    totals = ledger.reduce(skipped=True)
    assert not totals.finite
    assert totals.skipped
    np.testing.assert_array_equal(np.isnan(totals.loss_sum), [False, True, False])


def test_a_rank_that_holds_copies_adds_zeros() -> None:
    ledger = Ledger(2, torch.device("cpu"), contributes=False)
    ledger.add(torch.ones(2), torch.ones(2), torch.tensor([0, 1]))
    assert not ledger.reduce().token_count.any()


def test_errors_are_those_of_independent_samples() -> None:
    generator = np.random.default_rng(3)
    ledger = Ledger(2, torch.device("cpu"))
    means = [[], []]
    for _ in range(4):
        ids = generator.integers(0, 2, 5)
        means_now = generator.random(5) * 3
        ledger.add(torch.tensor(means_now * 16), torch.full((5,), 16.0), torch.tensor(ids))
        for domain, mean in zip(ids, means_now, strict=True):
            means[domain].append(mean)
    totals = ledger.reduce()
    expected = [np.std(part, ddof=1) / np.sqrt(len(part)) for part in means]
    np.testing.assert_allclose(totals.standard_error, expected, rtol=1e-12)
    ledger.add(torch.tensor([7.0]), torch.tensor([4.0]), torch.tensor([1]))
    alone = ledger.reduce()
    assert np.isnan(alone.standard_error).all()
    np.testing.assert_array_equal(alone.sample_count, [0, 1])


def test_excess_and_reference_are_kept_only_where_asked() -> None:
    plain, compared = (Ledger(2, torch.device("cpu"), compared=asked) for asked in (False, True))
    for ledger in (plain, compared):
        ledger.add(
            torch.tensor([3.0, 5.0]),
            torch.ones(2),
            torch.tensor([1, 1]),
            torch.tensor([0.5, 0.25]),
            torch.tensor([2.0, 4.0]),
        )
    assert plain.reduce().excess_sum is None
    totals = compared.reduce()
    np.testing.assert_array_equal(totals.excess_sum, [0.0, 0.75])
    np.testing.assert_array_equal(totals.reference_sum, [0.0, 6.0])
    np.testing.assert_array_equal(totals.mean(totals.excess_sum), [np.nan, 0.375])
