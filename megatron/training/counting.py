"""Counts of a run's training data, for a method that wants to know what counts can predict."""

from __future__ import annotations

import numpy as np

from megatron.config.model import ModelConfig
from megatron.data.count_model import HELD_OUT, count_loss
from megatron.data.domain import Domain
from megatron.mixing.decision import CountLosses
from megatron.mixing.observation import FloatArray
from megatron.training.domains import OpenDomains


def counter(domains: OpenDomains, model: ModelConfig) -> CountLosses:
    """Return what counts the training data of a run when it is asked to.

    Every rank counts the same windows, the first ones of the first pass, which are spread over
    the domain at random, and so comes to the same losses without a word to the others.

    Args:
        domains: opened; they must be open still when it is called.
        model: says the length of a window and the size of the vocabulary.
    """

    def count(tokens: FloatArray) -> FloatArray:
        losses = [
            _count(domain, float(wanted), model.context_length, model.vocab_size)
            for domain, wanted in zip(domains.train, tokens, strict=True)
        ]
        return np.array(losses, dtype=np.float64)

    return count


def _count(domain: Domain, tokens: float, length: int, vocab_size: int | None) -> float:
    """Return the count loss of one domain, nats per token; 0 where there is too little of it."""
    if domain.pack_impl != "packed" or domain.infilling is not None:
        # Counted as running text: padding and moved tokens would be learnt, too.
        domain = Domain(domain.name, domain.sources, seq_length=domain.seq_length, seed=domain.seed)
    # Those that are measured on come on top of those that are counted.
    wanted = int(tokens / length * HELD_OUT / (HELD_OUT - 1))
    total = min(domain.num_windows(0), max(wanted, HELD_OUT))
    if total < 2:
        return 0.0
    windows = np.stack([domain.sample(0, index)[:length] for index in range(total)])
    return count_loss(windows, vocab_size or int(windows.max()) + 1).loss
