"""What a run takes to begin: to its first step, and to open data of any size.

*First step.*  ``deepy.py train.py`` on a small model, from the command to the end of its first step
and to its own end, against the same of Hugging Face's ``Trainer``, and against nothing but
importing torch, DeepSpeed and transformers.  Whole commands, in turns; seconds, processor time, and
the memory of all processes of a command.

*Data.*  For each document length a domain of ``--tokens`` tokens is made: the ``.bin`` is sparse
(its blocks do not exist, its size does), the ``.idx`` is written for real.  Fresh processes open it
and assemble the first micro-batch, with the index out of the page cache and in it.  That
neither file was read whole is asserted.

*Planning.*  What drawing a step's samples takes.

    python benchmarks/startup.py
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.support.commands import Ran, figures, race, run, times
from benchmarks.support.measure import compared, machine, rounded, shown, spread, write
from megatron.data.domain import open_domain
from megatron.data.index_format import MAX_DOCUMENT_TOKENS, IndexHeader
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.data.writer import TokenWriter

_BLOCK = 1 << 18
_FIRST = "first step done"
_SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64}
_VOCABULARY = 512


def main() -> None:
    """Run the comparisons, print them and write them."""
    options = _options()
    if options.child:
        print(json.dumps(_CHILDREN[options.child[0]](*options.child[1:])))
        return
    with tempfile.TemporaryDirectory(prefix="startup-", dir=options.directory) as name:
        commands = _first_step(Path(name), options.turns)
        opened = [
            _opened(Path(name) / f"large{number}", int(options.tokens), int(length), options)
            for number, length in enumerate(options.document_tokens)
        ]
    content = {
        "benchmark": "startup",
        "command": "python benchmarks/startup.py",
        "machine": machine("torch", "deepspeed", "transformers", "numpy"),
        "settings": {"turns": options.turns, "rows": options.micro_batch, **_SHAPE},
        "first_step": commands,
        "opening": opened,
        "planning_ms": _planning(),
    }
    if options.write:
        print(f"wrote {write('startup', content)}")


def _first_step(folder: Path, turns: int) -> dict[str, Any]:
    """Time commands to their first step."""
    config = folder / "run.yml"
    _write_run(config)
    python, own = sys.executable, str(Path(__file__))

    def ours() -> Ran:
        shutil.rmtree(folder / "run", ignore_errors=True)
        words = [python, "deepy.py", "train.py", str(config), "--set", f"run_dir={folder}/run"]
        return run(words, until="step 1")

    commands: dict[str, Callable[[], Ran]] = {
        "neomix": ours,
        "transformers' Trainer": lambda: run(
            [python, own, "--child", "trainer", str(folder)], until=_FIRST
        ),
        "imports alone": lambda: run([python, "-c", "import torch, deepspeed, transformers"]),
    }
    found = race(commands, turns=turns)
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        rows[name] = {
            **figures(runs),
            "first_step_seconds": (
                spread([one.at for one in runs]) if runs[0].at == runs[0].at else None
            ),
            "time_over_ours": compared(times(runs), times(found["neomix"])),
        }
        row = rows[name]
        first = row["first_step_seconds"]
        print(
            f"{name}: {f'first step after {shown(first)} s, ' if first else ''}ended after "
            f"{shown(row['wall_seconds'])} s, processors {shown(row['processor_seconds'])} s, "
            f"{row['peak_bytes'] / 2**20:.0f} MiB; time / ours "
            f"{shown(row['time_over_ours']['processor'])}",
            flush=True,
        )
    return rows


def _write_run(config: Path) -> None:
    """Write a run of one step, and its data."""
    folder, random = config.parent, np.random.default_rng(0)
    for name in ("one", "two"):
        with TokenWriter(folder / name, "uint16") as writer:
            lengths = random.integers(50, 300, 200)
            writer.add_many(
                random.integers(0, _VOCABULARY, lengths.sum(), dtype=np.uint16), lengths
            )
    settings = {
        **_SHAPE,
        "num_gpus": 1,
        "vocab_size": _VOCABULARY,
        "domains": {name: {"train": str(folder / name)} for name in ("one", "two")},
        "mixing": {"method": "odm"},
        "train_iters": 1,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "log_interval": 1,
        "save_interval": 1000,
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")


def _trainer(folder: str) -> None:
    """Take one step by transformers' Trainer, on a model of the same shape."""
    import torch
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Tell(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            print(_FIRST, flush=True)

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=_VOCABULARY,
            hidden_size=_SHAPE["hidden_size"],
            num_hidden_layers=_SHAPE["num_layers"],
            num_attention_heads=_SHAPE["num_attention_heads"],
            intermediate_size=4 * _SHAPE["hidden_size"],
            max_position_embeddings=_SHAPE["seq_length"],
        )
    )
    rows = torch.randint(0, _VOCABULARY, (8, _SHAPE["seq_length"]))
    settings = TrainingArguments(
        output_dir=f"{folder}/trainer",
        max_steps=1,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=settings, train_dataset=data, callbacks=[Tell()]).train()


def _opened(
    prefix: Path, tokens: int, document_tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Open a large domain in fresh processes."""
    documents = _make_sparse(prefix, tokens, document_tokens)
    index, data = os.path.getsize(f"{prefix}.idx"), os.path.getsize(f"{prefix}.bin")
    row: dict[str, Any] = {
        "tokens": tokens,
        "documents": documents,
        "bin_bytes": data,
        "idx_bytes": index,
    }
    words = [sys.executable, __file__, "--child", "open", str(prefix)]
    words += [str(options.seq_length), str(options.micro_batch)]
    for name in ("cold", "warm"):
        runs = []
        for _ in range(options.turns):
            if name == "cold" and hasattr(os, "posix_fadvise"):
                with open(f"{prefix}.idx", "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            runs.append(json.loads(run(words).output))
        # What /proc does not tell elsewhere than on Linux reads as zero here.
        assert max(one["read_bytes"] for one in runs) < data / 1000, "the .bin was read whole"
        mapped = max(one["mapped_bytes"] for one in runs)
        assert mapped < max(index / 2, 64 << 10), "the .idx was read whole"
        row[name] = {key: spread([one[key] for one in runs]) for key in runs[0]}
        print(
            f"{tokens:.0e} tokens in {documents:,} documents, {name}: opened in "
            f"{shown(row[name]['open_ms'])} ms, first micro-batch {shown(row[name]['batch_ms'])} ms"
        )
    for suffix in (".bin", ".idx"):
        os.remove(f"{prefix}{suffix}")
    return row


def _make_sparse(prefix: Path, tokens: int, document_tokens: int) -> int:
    """Make a domain whose data take no disk space; return its number of documents."""
    if not 0 < document_tokens <= MAX_DOCUMENT_TOKENS:
        raise SystemExit(f"--document-tokens is at most {MAX_DOCUMENT_TOKENS}")
    documents = -(-tokens // document_tokens)
    dtype = np.dtype("<u2")
    index = IndexHeader(dtype=dtype, documents=documents, doc_idx_length=documents + 1)

    def column(count: int, kind: str, value: Callable[[Any], Any]) -> None:
        for first in range(0, count, _BLOCK):
            places = np.arange(first, min(first + _BLOCK, count), dtype=np.int64)
            out.write(value(places).astype(kind).tobytes())

    with open(f"{prefix}.idx", "wb") as out:
        out.write(index.pack())
        last = tokens - (documents - 1) * document_tokens
        column(documents, "<i4", lambda at: np.where(at < documents - 1, document_tokens, last))
        column(documents, "<i8", lambda at: at * document_tokens * dtype.itemsize)
        column(documents + 1, "<i8", lambda at: at)
        out.flush()
        os.fsync(out.fileno())
    with open(f"{prefix}.bin", "wb") as out:
        try:
            out.truncate(tokens * dtype.itemsize)
        except OSError as error:
            raise SystemExit(
                f"{out.name}: this file system does not hold a sparse file of "
                f"{tokens * dtype.itemsize} bytes ({error.strerror}); give another --directory, "
                "or fewer --tokens"
            ) from None
    return documents


def _open(prefix: str, seq_length: str, micro_batch: str) -> dict[str, float]:
    """Open, plan, assemble; return milliseconds and bytes."""
    length, rows = int(seq_length), int(micro_batch)
    before, read_before = _resident(), _bytes_read()
    start = time.perf_counter()
    domain = open_domain("large", [prefix], seq_length=length, seed=1234)
    opened = time.perf_counter()
    sampler = Sampler(["large"], [domain], seed=1234, global_batch=rows)
    loader = Loader(
        [domain], seq_length=length, micro_batch=rows, accumulation=1, data_rank=0, data_size=1
    )
    batch = next(loader.load(sampler.plan(1, [1.0])))
    end = time.perf_counter()
    assert batch.tokens.shape == (rows, length)
    measured = {
        "open_ms": 1e3 * (opened - start),
        "batch_ms": 1e3 * (end - opened),
        "added_bytes": _resident() - before,
        "read_bytes": _bytes_read() - read_before,
        "mapped_bytes": _mapped(prefix + ".idx"),
    }
    loader.close()
    return measured


def _planning() -> list[dict[str, Any]]:
    """Time a step's plan: 100 steps, weights drawn anew for each."""
    random = np.random.default_rng(0)
    rows = []
    for domains, batch in ((8, 256), (22, 1024), (1000, 1024), (1000, 4096)):
        row: dict[str, Any] = {"domains": domains, "batch": batch}
        for draw in ("apportion", "multinomial"):
            names = [str(place) for place in range(domains)]
            sampler = Sampler(names, [10**6] * domains, seed=1, global_batch=batch, draw=draw)
            taken = []
            for step in range(100):
                weights = random.dirichlet(np.ones(domains))
                start = time.process_time()
                sampler.plan(step, weights)
                taken.append(time.process_time() - start)
            row[draw] = rounded(1e3 * statistics.median(taken))
        rows.append(row)
    return rows


def _resident() -> int:
    """Return this process's resident memory in bytes (0 where /proc does not tell)."""
    return _of_proc("status", r"VmRSS:\s+(\d+) kB", 1024)


def _bytes_read() -> int:
    """Return the bytes that this process has got from read calls."""
    return _of_proc("io", r"rchar: (\d+)", 1)


def _of_proc(file: str, pattern: str, unit: int) -> int:
    try:
        found = re.search(pattern, Path(f"/proc/self/{file}").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * unit if found else 0


def _mapped(path: str) -> int:
    """Return how many bytes of a mapped file are resident in this process."""
    try:
        maps = Path("/proc/self/smaps").read_text()
    except OSError:
        return 0
    total, here = 0, False
    for line in maps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(path)
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


_CHILDREN: dict[str, Callable[..., Any]] = {"trainer": _trainer, "open": _open}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=float, default=1e12, help="tokens of the large domain")
    parser.add_argument(
        "--document-tokens",
        type=float,
        nargs="+",
        default=[2e9, 1e6],
        help="tokens per document, one domain for each (int32 holds up to 2147483647)",
    )
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--directory", help="where files are made (default: the system's)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
