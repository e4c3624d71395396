#!/usr/bin/env python3
r"""Count a bigram model of a dataset and measure it on train, validation and test data.

    python bigram_model.py --dataset_name code --train_samples 100000 --train --evaluate \
        --dataset_path data/code_text_document

The loss is what looking one token back gives: a baseline for a language model's.  The counts go
to {save_path}/{dataset_name}_bigram_model.npy: rows of token, next token and count, after one
with the size of the vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.bigram import Bigram, evaluate
from megatron.data.domain import Domain, open_domain
from megatron.errors import ConfigError, DataError, run_command

_ROWS = 4096


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--save_path", default="bigram_models", metavar="FOLDER",
        help="folder of the counts (default: bigram_models)")  # fmt: skip
    add("--dataset_name", required=True, metavar="NAME", help="name of the dataset")
    add("--train_samples", type=int, required=True, metavar="N",
        help="windows to count at most")  # fmt: skip
    add("--train", action="store_true", help="count; an existing model is left alone")
    add("--evaluate_samples", type=int, default=10_000_000, metavar="N",
        help="windows to measure at most, of each part (default: 10000000)")  # fmt: skip
    add("--evaluate", action="store_true", help="measure on train, validation and test")
    add("--dataset_path", default="data/{split}/{name}/{name}_text_document", metavar="PREFIX",
        help="prefix of the data, with {name} and {split} (train, validation, test) in it; one "
        "without {split} is divided by --split (default: "
        "data/{split}/{name}/{name}_text_document)")  # fmt: skip
    add("--split", default="969, 30, 1", help="shares of train, validation and test")
    add("--seq_length", type=int, default=1024, help="tokens of a window (default: 1024)")
    add("--vocab_size", type=int, help="token ids (default: what the data's .meta.json says)")
    add("--seed", type=int, default=1234, help="chooses the windows")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = _parser().parse_args(arguments)
    if not (given.train or given.evaluate):
        raise ConfigError("nothing to do: give --train, --evaluate or both")
    if given.train_samples < 1 or given.evaluate_samples < 1 or given.seq_length < 1:
        raise ConfigError("--train_samples, --evaluate_samples and --seq_length are at least 1")
    path = Path(given.save_path) / f"{given.dataset_name}_bigram_model.npy"
    if given.train and path.exists():
        print(f"{path} is there already; remove it to count anew")
    elif given.train:
        domain = _open(given, "train")
        model = Bigram(_vocab_size(given, domain))
        for rows in _blocks(domain, given.train_samples):
            model.update(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
        print(f"{path}: {model.counts.sum():,} pairs, {len(model.pairs):,} different ones")
    if given.evaluate:
        model = Bigram.load(path)
        for part in ("train", "validation", "test"):
            domain = _open(given, part)
            loss, perplexity, rows_read = evaluate(model, _blocks(domain, given.evaluate_samples))
            print(
                f"{part}: lm_loss {loss:.6f}, perplexity {perplexity:.4f} ({rows_read:,} windows)"
            )
    return 0


def _open(given: argparse.Namespace, part: str) -> Domain:
    prefix = given.dataset_path.replace("{name}", given.dataset_name)
    own = "valid" if part == "validation" else part
    return open_domain(
        given.dataset_name,
        [prefix.replace("{split}", part)],
        seq_length=given.seq_length,
        seed=given.seed,
        split=None if "{split}" in prefix else (given.split, own),
        epoch_offset=False,
    )


def _vocab_size(given: argparse.Namespace, domain: Domain) -> int:
    sidecar = domain.sources[0].reader.sidecar
    size = given.vocab_size or (sidecar.vocab_size if sidecar is not None else None)
    if not size:
        raise DataError(
            f"{domain.sources[0].reader.prefix} has no .meta.json that says the size of the "
            "vocabulary; give --vocab_size"
        )
    return int(size)


def _blocks(domain: Domain, samples: int) -> Iterator[NDArray[Any]]:
    count = min(domain.num_windows(0), samples)
    for first in range(0, count, _ROWS):
        yield np.stack([domain.sample(0, row) for row in range(first, min(first + _ROWS, count))])


if __name__ == "__main__":
    sys.exit(run_command(main))
