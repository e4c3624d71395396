"""The loss against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.model import DomainLoss

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 10, 16, 211


def _case(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = (torch.rand(ROWS, LENGTH, generator=generator) > 0.3).float()
    sample_weight = torch.rand(ROWS, generator=generator) / 1e6
    labels = (targets, mask, torch.tensor([2, 0, 2]), sample_weight)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def _plain(hidden, weight, labels, factor: float = 1.0):
    targets, mask, _, sample_weight = labels
    logits = hidden.float() @ weight.float().T
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses.view_as(mask) * mask * sample_weight[:, None]).sum()
    gradients = torch.autograd.grad(loss * factor, (hidden, weight))
    return loss.detach(), gradients, losses.detach().view_as(mask)


@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 1000])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    hidden, weight, labels = _case()
    expected, expected_gradients, _ = _plain(hidden, weight, labels, factor=3.0)
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=chunk)((hidden, weight), labels)
    gradients = torch.autograd.grad(loss * 3.0, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_padding_takes_no_part(chunk: int, dtype: torch.dtype) -> None:
    """Whatever the padded rows hold, loss and gradients are those of the true vocabulary."""
    hidden, weight, labels = _case(dtype)
    loss_fn = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=chunk)
    expected = loss_fn((hidden, weight), labels)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    losses = loss_fn.token_losses(hidden, weight, labels[0])
    rubbish = torch.full((13, HIDDEN), 50.0, dtype=dtype)
    padded = torch.cat([weight.detach(), rubbish]).requires_grad_()
    loss = loss_fn((hidden, padded), labels)
    gradients = torch.autograd.grad(loss, (hidden, padded))
    close = {"rtol": 1e-5, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-8}
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], expected_gradients[0], **close)
    torch.testing.assert_close(gradients[1][:VOCABULARY], expected_gradients[1], **close)
    assert not gradients[1][VOCABULARY:].any()
    torch.testing.assert_close(loss_fn.token_losses(hidden, padded, labels[0]), losses)


def test_observer_gets_sums_counts_and_domains() -> None:
    hidden, weight, labels = _case()
    _, _, losses = _plain(hidden, weight, labels)
    seen = []
    DomainLoss(vocab_size=VOCABULARY, chunk_tokens=4, observe=lambda *values: seen.append(values))(
        (hidden, weight), labels
    )
    [(sums, counts, domains)] = seen
    assert sums.dtype == counts.dtype == torch.float64
    assert not sums.requires_grad
    torch.testing.assert_close(sums, (losses * labels[1]).double().sum(1), rtol=1e-6, atol=0)
    assert torch.equal(counts, labels[1].double().sum(1))
    assert torch.equal(domains, labels[2])


def test_evaluation_equals_training_and_builds_no_graph() -> None:
    hidden, weight, labels = _case()
    seen = []
    loss_fn = DomainLoss(
        vocab_size=VOCABULARY, chunk_tokens=4, observe=lambda *values: seen.append(values)
    )
    training = loss_fn((hidden, weight), labels)
    with torch.no_grad():
        evaluation = loss_fn((hidden, weight), labels)
    assert not evaluation.requires_grad
    assert torch.equal(training.detach(), evaluation)
    assert torch.equal(seen[0][0], seen[1][0])
    _, _, losses = _plain(hidden, weight, labels)
    torch.testing.assert_close(
        loss_fn.token_losses(hidden, weight, labels[0]), losses, rtol=1e-6, atol=1e-6
    )


def test_a_graph_may_be_walked_twice() -> None:
    hidden, weight, labels = _case()
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=4)((hidden, weight), labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_loses_no_small_gradient(dtype: torch.dtype, tolerance: float) -> None:
    """Sample weights near 1e-6 would vanish in fp16 if gradients were taken with them."""
    hidden, weight, labels = _case(dtype)
    expected, expected_gradients, _ = _plain(hidden, weight, labels, factor=65536.0)
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=8)((hidden, weight), labels)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss * 65536.0, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == dtype
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < tolerance


def test_all_masked_rows_cost_nothing_and_move_nothing() -> None:
    hidden, weight, labels = _case()
    targets, mask, domains, sample_weight = labels
    loss = DomainLoss(vocab_size=VOCABULARY)(
        (hidden, weight), (targets, mask * 0, domains, sample_weight)
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0.0
    assert all(g.abs().max() == 0 for g in gradients)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels = _case()
    big = (hidden.detach() * 1e4).requires_grad_()
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=4)((big, weight), labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (big, weight)))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary_is_an_error(token: int, padding: int) -> None:
    hidden, weight, labels = _case()
    weight = torch.cat([weight, torch.zeros(padding, HIDDEN)])
    labels[0][1, 2] = token
    with pytest.raises((IndexError, RuntimeError)):
        DomainLoss(vocab_size=VOCABULARY)((hidden, weight), labels)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels = _case()
    frozen = weight.detach()
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=4)((hidden, frozen), labels)
    (found,) = torch.autograd.grad(loss, (hidden,))
    torch.testing.assert_close(found, _plain(hidden, weight, labels)[1][0], rtol=1e-5, atol=1e-9)
    loss = DomainLoss(vocab_size=VOCABULARY, chunk_tokens=4)((hidden.detach(), weight), labels)
    (found,) = torch.autograd.grad(loss, (weight,))
    torch.testing.assert_close(found, _plain(hidden, weight, labels)[1][1], rtol=1e-5, atol=1e-9)


def test_memory_that_is_kept_changes_no_number() -> None:
    """Micro-batches of several sizes and types, one after the other, as with fresh memory."""
    generator = torch.Generator().manual_seed(3)
    kept = DomainLoss(vocab_size=50, chunk_tokens=8)
    for length, dtype in ((7, torch.float32), (20, torch.float32), (3, torch.bfloat16), (20, None)):
        hidden = torch.randn(2, length, 16, generator=generator).to(dtype or torch.float32)
        weight = torch.randn(64, 16, generator=generator).to(hidden.dtype)
        labels = (
            torch.randint(0, 50, (2, length), generator=generator),
            torch.ones(2, length),
            torch.zeros(2, dtype=torch.int64),
            torch.full((2,), 0.1),
        )
        results = []
        for loss_fn in (kept, DomainLoss(vocab_size=50, chunk_tokens=8)):
            parts = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = loss_fn(parts, labels)
            loss.backward()
            results.append((loss.detach(), *(part.grad for part in parts)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept._scratch._kept is not None
