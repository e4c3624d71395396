"""How fast a run of any size starts, and how fast its samples come.

    python benchmarks/startup.py [--tokens 1e12] [--output benchmarks/results/startup.md]

*Start-up.*  For each document length, a domain of ``--tokens`` tokens is made: the ``.bin`` is
sparse (its blocks do not exist, its size does), the ``.idx`` is written for real.  A fresh
process opens it and assembles the first micro-batch, with the index evicted from the page cache
and again with it there.  Printed: time, resident memory, and how much of either file was touched;
that neither was read whole is asserted, no time is.

*Throughput.*  Several domains of real tokens in the page cache; every round measures all rows
in turn, so that other load on the machine meets all of them alike.  The limits are plain NumPy
on one memory-mapped file, front to back: a slice copied out, and the same micro-batches made of
such slices.

All files are made in a temporary folder and removed at the end.
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.domain import Domain, open_domain
from megatron.data.index_format import MAX_DOCUMENT_TOKENS, IndexHeader
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.data.writer import TokenWriter

MIB = 1 << 20
BLOCK = 1 << 18


def main() -> int:
    """Measure, print, and write the result if asked to."""
    options = parse()
    if options.child:
        print(json.dumps(first_batch(options.child, options.seq_length, options.micro_batch)))
        return 0
    with tempfile.TemporaryDirectory(prefix="startup-", dir=options.directory) as folder:
        lines = startup_table(Path(folder), options)
        lines += ["", *throughput_table(Path(folder), options), "", *plan_table()]
    report = "\n".join(header() + lines) + "\n"
    print(report)
    if options.output:
        Path(options.output).write_text(report, encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    parser.add_argument("--repeat", type=int, default=5, help="fresh processes per row, and rounds")
    parser.add_argument("--directory", help="where the files are made (default: the system's)")
    parser.add_argument("--output", help="write the result here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def header() -> list[str]:
    """Say when, where and how."""
    command = " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]])
    return [
        "# Start-up and sample throughput",
        "",
        f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, Python "
        f"{platform.python_version()}, NumPy {np.__version__}; `{command}`",
        "",
    ]


def startup_table(folder: Path, options: argparse.Namespace) -> list[str]:
    """Open large domains in fresh processes."""
    lines = [
        "## Opening a large domain, and its first micro-batch",
        "",
        f"Medians of {options.repeat} fresh processes; {options.micro_batch} samples of "
        f"{options.seq_length} tokens. `Resident` is the whole process, interpreter and NumPy "
        "included, before opening and after the first micro-batch.",
        "",
        "| tokens | documents | .bin (sparse) | .idx | index in page cache | open | first "
        "micro-batch | resident before → after | bytes read | .idx resident |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, length in enumerate(options.document_tokens):
        prefix = folder / f"large{number}"
        documents = make_sparse(prefix, int(options.tokens), int(length))
        for cold in (True, False):
            runs = [run_child(prefix, options, cold) for _ in range(options.repeat)]
            lines.append(startup_row(prefix, int(options.tokens), documents, cold, runs))
        for suffix in (".bin", ".idx"):
            os.remove(f"{prefix}{suffix}")
    return lines


def make_sparse(prefix: Path, tokens: int, document_tokens: int) -> int:
    """Make a domain whose data take no disk space; return its number of documents."""
    if not 0 < document_tokens <= MAX_DOCUMENT_TOKENS:
        raise SystemExit(f"--document-tokens is at most {MAX_DOCUMENT_TOKENS}")
    documents = -(-tokens // document_tokens)
    dtype = np.dtype("<u2")
    index = IndexHeader(dtype=dtype, documents=documents, doc_idx_length=documents + 1)

    def column(count: int, kind: str, value: Callable[[Any], Any]) -> None:
        for first in range(0, count, BLOCK):
            places = np.arange(first, min(first + BLOCK, count), dtype=np.int64)
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


def run_child(prefix: Path, options: argparse.Namespace, cold: bool) -> dict[str, float]:
    """Measure in a fresh process."""
    if cold and hasattr(os, "posix_fadvise"):
        with open(f"{prefix}.idx", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", str(prefix)]
    command += ["--seq-length", str(options.seq_length), "--micro-batch", str(options.micro_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def first_batch(prefix: str, seq_length: int, micro_batch: int) -> dict[str, float]:
    """Open, plan, assemble; return times in seconds and sizes in bytes."""
    before = resident()
    read_before = bytes_read()
    start = time.perf_counter()
    domain = open_domain("large", [prefix], seq_length=seq_length, seed=1234)
    opened = time.perf_counter()
    sampler = Sampler(["large"], [domain], seed=1234, global_batch=micro_batch)
    loader = Loader(
        [domain],
        seq_length=seq_length,
        micro_batch=micro_batch,
        accumulation=1,
        data_rank=0,
        data_size=1,
    )
    batch = next(loader.load(sampler.plan(1, [1.0])))
    end = time.perf_counter()
    assert batch.tokens.shape == (micro_batch, seq_length)
    measured = {
        "windows": domain.num_windows(0),
        "open": opened - start,
        "batch": end - opened,
        "before": before,
        "after": resident(),
        "read": bytes_read() - read_before,
        "mapped": mapped_resident(prefix + ".idx"),
    }
    loader.close()
    return measured


def startup_row(
    prefix: Path, tokens: int, documents: int, cold: bool, runs: Sequence[dict[str, float]]
) -> str:
    """Check that neither file was read whole, and format a row."""
    index, data = os.path.getsize(f"{prefix}.idx"), os.path.getsize(f"{prefix}.bin")
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    # What /proc does not tell elsewhere than on Linux reads as zero here.
    assert max(run["read"] for run in runs) < data / 1000, "the .bin was read whole"
    assert max(run["mapped"] for run in runs) < max(index / 2, 64 << 10), "the .idx was read whole"
    return (
        f"| {tokens:.3g} | {documents:,} | {data / 1e12:.2f} TB | {index / 1e6:.3g} MB | "
        f"{'no' if cold else 'yes'} | {middle['open'] * 1e3:.2f} ms | "
        f"{middle['batch'] * 1e3:.2f} ms | {middle['before'] / MIB:.1f} → "
        f"{middle['after'] / MIB:.1f} MiB | {middle['read'] / 1024:.0f} KiB | "
        f"{middle['mapped'] / 1024:.0f} KiB |"
    )


def throughput_table(folder: Path, options: argparse.Namespace) -> list[str]:
    """Measure samples per second against plain slices."""
    length, domains = options.seq_length, several_domains(folder, options.seq_length)
    stream = np.memmap(f"{domains[0].sources[0].reader.prefix}.bin", dtype="<u2", mode="r")
    rows = {
        "limit: contiguous slice": lambda count: slices(stream, length, count),
        "`Domain.sample`, shuffled": lambda count: shuffled(domains, count),
        "limit: micro-batches of contiguous slices": lambda count: plain_batches(
            stream, length, options.micro_batch, count
        ),
        "`Loader`, all domains, planned and shuffled": lambda count: loaded(
            domains, length, options.micro_batch, count
        ),
    }
    wall: dict[str, list[float]] = {name: [] for name in rows}
    work: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.repeat + 1):
        for name, measure in rows.items():
            start, worked = time.perf_counter(), time.process_time()
            count = measure(4096)
            work[name].append((time.process_time() - worked) / count)
            wall[name].append((time.perf_counter() - start) / count)
    limits = [statistics.median(work[name][1:]) for name in rows if name.startswith("limit")]
    lines = [
        "## Samples per second",
        "",
        f"One process, {len(domains)} domains of {domains[0].num_tokens:,} uint16 tokens in the "
        f"page cache, {length} tokens a sample, micro-batches of {options.micro_batch} as int64 "
        f"tokens, targets and a float32 mask; medians of {options.repeat} rounds of 4,096 samples.",
        "",
        "`Of its limit` compares processor time, which other load on the machine disturbs least.",
        "",
        "| what | samples/s | tokens/s | processor time a sample | of its limit |",
        "|---|---|---|---|---|",
    ]
    for place, name in enumerate(rows):
        rate, used = 1 / statistics.median(wall[name][1:]), statistics.median(work[name][1:])
        lines.append(
            f"| {name} | {rate:,.0f} | {rate * length:.2e} | {used * 1e6:.1f} µs | "
            f"{limits[place // 2] / used:.0%} |"
        )
    return lines


def several_domains(folder: Path, seq_length: int) -> list[Domain]:
    """Write eight domains of random documents; they stay in the page cache."""
    random = np.random.default_rng(0)
    domains = []
    for place in range(8):
        with TokenWriter(folder / f"domain{place}", "uint16") as writer:
            lengths = random.integers(50, 3000, 4000)
            writer.add_many(random.integers(0, 50000, lengths.sum(), dtype=np.uint16), lengths)
        prefix = folder / f"domain{place}"
        domains.append(open_domain(f"d{place}", [prefix], seq_length=seq_length, seed=1))
    return domains


def slices(stream: Any, length: int, count: int) -> int:
    """Copy consecutive windows out of one mapping."""
    most = (stream.size - 1) // length
    for window in range(count):
        start = window % most * length
        np.array(stream[start : start + length + 1])
    return count


def shuffled(domains: Sequence[Domain], count: int) -> int:
    """Fetch samples of all domains in turn, in shuffled order."""
    each = count // len(domains)
    for index in range(each):
        for domain in domains:
            epoch, place = divmod(index, domain.num_windows(0) - 1)
            domain.sample(epoch, place)
    return each * len(domains)


def plain_batches(stream: Any, length: int, rows: int, count: int) -> int:
    """Make the arrays of micro-batches out of consecutive windows, and nothing else."""
    most = (stream.size - 1) // length
    for first in range(0, count, rows):
        tokens = np.empty((rows, length), dtype=np.int64)
        targets = np.empty((rows, length), dtype=np.int64)
        for row in range(rows):
            start = (first + row) % most * length
            tokens[row] = stream[start : start + length]
            targets[row] = stream[start + 1 : start + length + 1]
        np.ones((rows, length), dtype=np.float32)
    return count


def loaded(domains: Sequence[Domain], length: int, rows: int, count: int) -> int:
    """Plan, load and take whole steps of 64 micro-batches, as a training loop would."""
    accumulation, weights = 64, np.ones(len(domains))
    total = accumulation * rows
    sampler = Sampler([domain.name for domain in domains], domains, seed=1, global_batch=total)
    loader = Loader(
        domains,
        seq_length=length,
        micro_batch=rows,
        accumulation=accumulation,
        data_rank=0,
        data_size=1,
        vocab_size=50000,
    )
    taken = 0
    for step in range(max(count // total, 1)):
        for batch in loader.load(sampler.plan(step, weights)):
            taken += len(batch.tokens)
    loader.close()
    return taken


def plan_table() -> list[str]:
    """Time a step's plan."""
    lines = [
        "## Planning a step",
        "",
        "Median of 100 steps, weights drawn anew for each.",
        "",
        "| domains | global batch | apportioned | multinomial |",
        "|---|---|---|---|",
    ]
    random = np.random.default_rng(0)
    for domains, batch in ((8, 256), (22, 1024), (1000, 1024), (1000, 4096)):
        cells = []
        for draw in ("apportion", "multinomial"):
            sampler = Sampler(
                [str(place) for place in range(domains)],
                [10**6] * domains,
                seed=1,
                global_batch=batch,
                draw=draw,
            )
            times = []
            for step in range(100):
                weights = random.dirichlet(np.ones(domains))
                start = time.perf_counter()
                sampler.plan(step, weights)
                times.append(time.perf_counter() - start)
            cells.append(f"{statistics.median(times) * 1e3:.2f} ms")
        lines.append(f"| {domains} | {batch} | {' | '.join(cells)} |")
    return lines


def resident() -> int:
    """Return this process's resident memory in bytes (0 where /proc does not tell)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def bytes_read() -> int:
    """Return the bytes this process has got from read calls."""
    try:
        counters = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    found = re.search(r"rchar: (\d+)", counters)
    return int(found.group(1)) if found else 0


def mapped_resident(path: str) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
