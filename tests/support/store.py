"""A loss store whose numbers are made up: a token's loss depends on the token and its domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import runs

from megatron.data.domain import Domain
from megatron.data.loss_header import StoreHeader, describe_domain
from megatron.data.loss_store import stream_starts
from megatron.data.loss_writing import BlockWriter, mark_scored, prepare_store


def made_up_losses() -> dict[str, np.ndarray]:
    """Return by domain the loss of each token id, in numbers that float16 holds exactly."""
    random = np.random.default_rng(11)
    return {
        name: np.float16(random.uniform(1.0, 6.0, 128)).astype(np.float32) for name in runs.DOMAINS
    }


def write_store(folder: Path, domains: list[Domain], *, split: str, vocab_size: int) -> None:
    """Write the made-up losses of every window.

    Args:
        folder: of the store.
        domains: opened on their training parts, with cuts that stay where they are.
        split: of the run.
        vocab_size: of the run.
    """
    facts = StoreHeader(
        seq_length=domains[0].seq_length,
        epoch_offset=False,
        seed=None,
        vocab_size=vocab_size,
        precision="fp32",
        model_hash="0" * 64,
        model={"checkpoint": "made up"},
        domains={domain.name: describe_domain(domain, split=split, epochs=1) for domain in domains},
    )
    header, losses = prepare_store(folder, facts), made_up_losses()
    with BlockWriter(folder, header.domains) as writer:
        for domain in domains:
            windows = domain.stream_windows(0)
            numbers = np.arange(windows.count)
            places = [domain.window_at(0, int(number)) for number in numbers]
            length = domain.seq_length
            targets = np.stack(
                [reader.read(start + 1, start + 1 + length) for reader, start in places]
            )
            starts = stream_starts(domain, windows, numbers)
            writer.write(domain.name, 0, starts, losses[domain.name][targets.astype(np.int64)])
        writer.sync()
    for domain in domains:
        header = mark_scored(folder, header, domain.name, 0, domain.num_windows(0))
