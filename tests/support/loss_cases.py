"""The vocabulary-parallel loss beside torch's own: what each case does on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron.model import DomainLoss
from megatron.parallel.cross_entropy import token_cross_entropy, weighted_cross_entropy
from megatron.parallel.partition import Partition
from megatron.parallel.sequence import enter_shared
from tests.support.layer_cases import BATCH, HIDDEN, LENGTH, Bench, Pairs


def _weighted(
    bench: Bench, vocabulary: int, padded: int, chunk: int, scale: float, z_loss: float = 0.0
) -> Pairs:
    """Compare sum, losses and gradients; padding is filled with what must not be seen."""
    hidden, weight, partition = _given(bench, vocabulary, padded, scale)
    targets, token_weights = _targets(bench, vocabulary)
    options = {"vocab_size": vocabulary, "topology": bench.topology, "chunk_tokens": chunk}
    own = bench.sequence(hidden).clone().requires_grad_()
    flat = enter_shared(own, bench.topology).flatten(0, 1)
    total, losses = weighted_cross_entropy(
        flat, weight, targets, token_weights, **options, z_loss=z_loss
    )
    (3.0 * total).backward()
    plain = hidden.float().requires_grad_()
    true = bench.whole(weight.detach(), partition)[:vocabulary].float().requires_grad_()
    logits = (plain @ true.T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected_total = torch.dot(expected + z_loss * logits.logsumexp(-1).square(), token_weights)
    (3.0 * expected_total).backward()
    gradient = bench.whole(weight.grad, partition)
    padding = gradient[vocabulary:]
    evaluated = token_cross_entropy(flat, weight, targets, **options)
    return {
        "total": (total.detach(), expected_total.detach()),
        "losses": (losses, expected.detach()),
        "evaluated": (evaluated, expected.detach()),
        "hidden": (own.grad, bench.sequence(plain.grad).to(bench.dtype)),
        "weight": (gradient[:vocabulary], true.grad.to(bench.dtype)),
        "padding": (padding, torch.zeros_like(padding)),
    }


def _domains(bench: Bench, vocabulary: int, padded: int, chunk: int) -> Pairs:
    """Compare the loss of domains, with masks and sample weights, and what is observed."""
    hidden, weight, partition = _given(bench, vocabulary, padded, 1.0)
    targets, _ = _targets(bench, vocabulary)
    mask = (targets % 3 != 0).float().view(BATCH, LENGTH)
    sample_weight = torch.tensor([0.5, 0.0, 2.0]) / 1e4
    labels = (targets.view(BATCH, LENGTH), mask, torch.tensor([1, 0, 1]), sample_weight)
    seen: list[torch.Tensor] = []
    loss_fn = DomainLoss(
        vocab_size=vocabulary,
        topology=bench.topology,
        chunk_tokens=chunk,
        observe=lambda sums, *_: seen.append(sums),
    )
    own = bench.sequence(hidden).clone().requires_grad_()
    loss = loss_fn((own, weight), labels)
    loss.backward()
    plain = hidden.float().requires_grad_()
    true = bench.whole(weight.detach(), partition)[:vocabulary].float()
    expected = F.cross_entropy((plain @ true.T).flatten(0, 1), targets, reduction="none")
    sums = (expected.view_as(mask) * mask).sum(dim=1)
    (sums * sample_weight).sum().backward()
    return {
        "loss": (loss.detach(), (sums * sample_weight).sum().detach()),
        "observed": (seen[0], sums.detach().double()),
        "hidden": (own.grad, bench.sequence(plain.grad).to(bench.dtype)),
        "tokens": (
            loss_fn.token_losses(own.detach(), weight, labels[0]),
            expected.detach().view(BATCH, LENGTH),
        ),
    }


def _given(
    bench: Bench, vocabulary: int, padded: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Partition]:
    """Return hidden states, this rank's rows of the output weight, and how it is divided."""
    hidden = bench.draw("hidden", BATCH, LENGTH, HIDDEN) * scale
    true = bench.draw("weight", vocabulary, HIDDEN)
    rubbish = torch.full((padded - vocabulary, HIDDEN), 9.0, dtype=bench.dtype)
    rows = Partition(dim=0, blocks=(padded,))
    ranks, rank = bench.topology.tensor_size, bench.topology.tensor_rank
    weight = rows.part(torch.cat([true, rubbish]), rank, ranks).clone().requires_grad_()
    return hidden, weight, rows


def _targets(bench: Bench, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 + bench.topology.data_rank)
    targets = torch.randint(0, vocabulary, (BATCH * LENGTH,), generator=generator)
    weights = torch.rand(BATCH * LENGTH, generator=generator) / 1e5
    # Both ends of the vocabulary, and tokens that do not count.
    targets[0], targets[1] = 0, vocabulary - 1
    weights[2:5] = 0.0
    return targets, weights


LOSSES: dict[str, tuple[Callable[..., Pairs], tuple[Any, ...]]] = {
    "whole vocabulary": (_weighted, (40, 40, 1000, 1.0)),
    "padding, a token at a time": (_weighted, (37, 40, 1, 1.0)),
    "padding, uneven chunks": (_weighted, (37, 40, 7, 1.0)),
    "ranks without ids": (_weighted, (7, 16, 5, 1.0)),
    "z-loss": (_weighted, (37, 40, 7, 1.0, 0.05)),
    "z-loss, ranks without ids": (_weighted, (7, 16, 5, 1.0, 0.05)),
    "extreme logits": (_weighted, (37, 40, 7, 30.0)),
    "domains": (_domains, (37, 40, 7)),
    "domains, ranks without ids": (_domains, (3, 16, 1000)),
}
