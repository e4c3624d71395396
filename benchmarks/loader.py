"""Samples per second of our loader, megatron-core's blended dataset and Hugging Face datasets.

All read the same tokens (megatron-core the same files), draw from the same domains in equal parts
in shuffled order, and hand out micro-batches of int64 tokens and targets and a float mask, as torch
tensors.  What building everything takes is timed by itself: for us opening the files, for
megatron-core its sample index and blend (in a fresh cache), for Hugging Face the permutations (its
table of samples, already cut, is made outside the clock).

    python benchmarks/loader.py
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.measure import Times, compared, machine, race, rounded, shown, timed, write

Batches = Iterator[Any]


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefixes = _write_data(folder, options)
        makers: dict[str, Callable[[], Batches]] = {
            "neomix": _ours(prefixes, options),
            "megatron-core": _megatron_core(prefixes, folder, options),
            "Hugging Face datasets": _datasets(prefixes, options),
        }
        built = {name: Times() for name in makers}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            streams = {name: timed(make, built[name]) for name, make in makers.items()}
        seen: dict[str, Any] = {}

        def taking(name: str) -> Callable[[], None]:
            def take() -> None:
                for batch in islice(streams[name], options.batches):
                    seen[name] = batch

            return take

        times = race({name: taking(name) for name in makers}, turns=options.turns)
        _check(seen, options)
    samples = options.batches * options.rows
    rows = {
        name: {
            "built_seconds": rounded(built[name].processor[0]),
            "microseconds_a_sample": rounded(
                1e6 * statistics.median(times[name].processor) / samples
            ),
            "samples_per_second": rounded(samples / statistics.median(times[name].wall)),
            "time_over_ours": compared(times[name], times["neomix"]),
        }
        for name in makers
    }
    for name, row in rows.items():
        print(
            f"{name:>24}: built in {row['built_seconds']:.2f} s, "
            f"{row['microseconds_a_sample']:.1f} µs a sample, {row['samples_per_second']:,.0f} "
            f"samples/s; time / ours {shown(row['time_over_ours']['processor'])}"
        )
    content = {
        "benchmark": "loader",
        "command": "python benchmarks/loader.py",
        "machine": machine("torch", "megatron-core", "datasets", "numpy"),
        "settings": vars(options),
        "results": rows,
    }
    if options.write:
        print(f"wrote {write('loader', content)}")


def _write_data(folder: Path, options: argparse.Namespace) -> list[Path]:
    from megatron.data.writer import TokenWriter

    random = np.random.default_rng(0)
    prefixes = []
    for number in range(options.domains):
        prefix = folder / f"domain{number}"
        with TokenWriter(prefix, "uint16") as writer:
            lengths = random.integers(50, 3000, options.documents)
            writer.add_many(random.integers(0, 50000, lengths.sum(), dtype=np.uint16), lengths)
        prefixes.append(prefix)
    return prefixes


def _ours(prefixes: list[Path], options: argparse.Namespace) -> Callable[[], Batches]:
    from megatron.data.domain import open_domain
    from megatron.data.loader import Loader
    from megatron.data.sampler import Sampler

    def make() -> Batches:
        length, accumulation = options.sequence, 16
        domains = [
            open_domain(prefix.name, [prefix], seq_length=length, seed=1) for prefix in prefixes
        ]
        sampler = Sampler(
            [domain.name for domain in domains],
            domains,
            seed=1,
            global_batch=accumulation * options.rows,
        )
        loader = Loader(
            domains,
            seq_length=length,
            micro_batch=options.rows,
            accumulation=accumulation,
            data_rank=0,
            data_size=1,
            vocab_size=50000,
        )

        def batches() -> Batches:
            step, weights = 0, np.ones(len(domains))
            while True:
                step += 1
                for batch in loader.load(sampler.plan(step, weights)):
                    parts = (batch.tokens, batch.targets, batch.loss_mask)
                    yield tuple(torch.as_tensor(part) for part in parts)

        return batches()

    return make


def _megatron_core(
    prefixes: list[Path], folder: Path, options: argparse.Namespace
) -> Callable[[], Batches]:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 50000, 49999, 49998, {"class": "none"}

    def make() -> Batches:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
            )
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=options.sequence,
            blend=([str(prefix) for prefix in prefixes], [1.0] * len(prefixes)),
            split="1,0,0",  # it counts epochs of a part without documents for ever
            path_to_cache=str(folder / "cache"),
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        wanted = options.batches * options.rows * (options.turns + 2)
        train, *_ = BlendedMegatronDatasetBuilder(
            GPTDataset, [wanted, 0, 0], lambda: True, config
        ).build()
        loader = torch.utils.data.DataLoader(train, batch_size=options.rows)

        def batches() -> Batches:
            while True:
                for batch in loader:
                    yield batch["tokens"], batch["labels"], batch["loss_mask"]

        return batches()

    return make


def _datasets(prefixes: list[Path], options: argparse.Namespace) -> Callable[[], Batches]:
    import datasets

    datasets.disable_progress_bars()
    length = options.sequence + 1
    parts = []
    for prefix in prefixes:
        stream = np.fromfile(f"{prefix}.bin", dtype="<u2")
        windows = stream[: len(stream) // length * length].reshape(-1, length).astype(np.int64)
        parts.append(datasets.Dataset.from_dict({"tokens": windows}).with_format("torch"))

    def make() -> Batches:
        mixed = datasets.interleave_datasets(
            [part.shuffle(seed=1) for part in parts],
            probabilities=[1 / len(parts)] * len(parts),
            seed=1,
            stopping_strategy="all_exhausted",
        ).with_format("torch")
        mask = torch.ones(options.rows, options.sequence)

        def batches() -> Batches:
            while True:
                for batch in torch.utils.data.DataLoader(mixed, batch_size=options.rows):
                    tokens = batch["tokens"]
                    yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask.clone()

        return batches()

    return make


def _check(seen: dict[str, Any], options: argparse.Namespace) -> None:
    """Check that everyone hands out the same kind of thing."""
    for name, (tokens, targets, mask) in seen.items():
        assert tokens.shape == targets.shape == mask.shape == (options.rows, options.sequence), name
        assert tokens.dtype == targets.dtype == torch.int64, name
        assert torch.equal(tokens[:, 1:], targets[:, :-1]), name


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--domains", type=int, default=8)
    parser.add_argument("--documents", type=int, default=1000, help="of a domain")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--batches", type=int, default=64, help="of a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
