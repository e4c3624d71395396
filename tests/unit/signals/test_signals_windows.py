"""Sums by window: each falls into its place once, padding changes nothing."""

from __future__ import annotations

import numpy as np
import torch

from megatron.signals.windows import HeldOut, WindowSums


def test_domains_are_weighted_by_tokens_and_windows_stand_alone() -> None:
    sums = WindowSums(3, torch.device("cpu"))
    # Windows 0 and 1 are of domain 0, 2 of domain 2; the last row is padding.
    sums.add(torch.tensor([8.0, 3.0]), torch.tensor([4.0, 1.0]), torch.tensor([0, 1]))
    sums.add(torch.tensor([6.0, float("nan")]), torch.tensor([2.0, 0.0]), torch.tensor([2, 2]))
    loss, tokens = sums.reduce()
    held_out = HeldOut(
        loss_sum=loss, token_count=tokens, window_domain=np.array([0, 0, 2]), domains=3
    )
    np.testing.assert_array_equal(held_out.loss, [11 / 5, np.nan, 3.0])
    np.testing.assert_array_equal(held_out.window_loss, [2.0, 3.0, 3.0])
    assert held_out.tokens == 7


def test_a_rank_with_copies_adds_nothing() -> None:
    sums = WindowSums(1, torch.device("cpu"), contributes=False)
    sums.add(torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert not sums.reduce()[1].any()
