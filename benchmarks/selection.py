"""Score a million short documents by bm25, and a part of them by rank_bm25 as well.

The documents are made here: words drawn by Zipf's law.  ``tools/select_data.py score`` runs as a
user runs it; memory is that of its whole process tree, read every 50 ms.  rank_bm25, which holds
every document's frequencies and passes over all of them for every word of a query, scores a part;
on that both must give the same numbers to the bit.

    python benchmarks/selection.py
    python benchmarks/selection.py --report benchmarks/results/selection.md
"""

from __future__ import annotations

import sys
from pathlib import Path

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megatron.errors import DataError, run_command

ROOT = Path(__file__).resolve().parents[1]
SUBTASKS, EXAMPLES, EXAMPLE_WORDS = 4, 5, 100
LIMIT_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command took.

    Attributes:
        wall: seconds, start-up included.
        cpu: seconds that its processes computed, which other load disturbs less.
        peak: most bytes that its processes held together.
    """

    wall: float
    cpu: float
    peak: int


def main() -> int:
    """Run the benchmark; 1 if the scores differ or the memory is more than is allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the corpus")
    parser.add_argument("--part", type=int, default=20_000, help="documents for rank_bm25")
    parser.add_argument("--vocabulary", type=int, default=300_000, help="different words")
    parser.add_argument("--folder", help="where the corpus is made (default: a temporary one)")
    parser.add_argument("--report", metavar="FILE", help="write the result there as Markdown")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return run_peer(*map(Path, options.peer))
    with tempfile.TemporaryDirectory(prefix="selection-", dir=options.folder) as temporary:
        folder = Path(temporary)
        corpus, part = folder / "corpus.jsonl", folder / "part.jsonl"
        words = make(folder, options)
        with open(corpus, encoding="utf-8") as lines, open(part, "w", encoding="utf-8") as file:
            file.writelines(itertools.islice(lines, options.part))
        size = corpus.stat().st_size
        whole = measured(ours(folder, corpus, "whole"), folder / "whole.log")
        of_part = measured(ours(folder, part, "part"), folder / "part.log")
        peer_file = folder / "peer.npy"
        command = [sys.executable, __file__, "--peer", str(part), str(peer_file)]
        peer = measured(command, folder / "peer.log")
        same = bool(np.array_equal(table_scores(folder / "part.parquet"), np.load(peer_file)))
    lines = report(options, size, words, {"whole": whole, "part": of_part, "peer": peer}, same)
    print("\n".join(lines))
    if options.report:
        Path(options.report).write_text("\n".join(lines) + "\n")
    return 0 if same and whole.peak < LIMIT_GIB * 2**30 else 1


def ours(folder: Path, corpus: Path, name: str) -> list[str]:
    """Return the command that scores a corpus."""
    return [
        sys.executable, str(ROOT / "tools" / "select_data.py"), "score", "--method", "bm25",
        "--train", str(corpus), "--target", f"task={folder / 'target'}",
        "--out", str(folder / f"{name}.parquet"),
    ]  # fmt: skip


def make(folder: Path, options: argparse.Namespace) -> int:
    """Write corpus and targets; return the corpus's number of words."""
    rng = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, options.vocabulary + 1)
    ends = np.cumsum(weights / weights.sum())
    names = np.array([spelled(at) for at in range(options.vocabulary)])

    def text(length: int) -> str:
        drawn = np.minimum(np.searchsorted(ends, rng.random(length)), options.vocabulary - 1)
        return " ".join(names[drawn]).capitalize() + "."

    total = 0
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for length in rng.integers(20, 61, options.documents):
            total += int(length)
            file.write(json.dumps({"text": text(length)}) + "\n")
    (folder / "target").mkdir()
    for at in range(SUBTASKS):
        with open(folder / "target" / f"subtask{at}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(EXAMPLES):
                file.write(json.dumps({"text": text(EXAMPLE_WORDS)}) + "\n")
    return total


def spelled(number: int) -> str:
    """Return a word for a number, longer for rarer ones."""
    letters = ""
    while True:
        number, rest = divmod(number, 20)
        letters += "bcdfghjklmnpqrstvwxz"[rest] + "aeiou"[number % 5]
        if not number:
            return letters


def measured(command: list[str], log: Path) -> Run:
    """Run a command and watch its processes' memory.

    Raises:
        DataError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    peak, ended = [0], threading.Event()
    before = children_seconds()
    started = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )

        def watch() -> None:
            while not ended.wait(0.05):
                peak[0] = max(peak[0], sum(map(resident, tree(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        wall = time.perf_counter() - started
        ended.set()
        watcher.join()
    if code:
        raise DataError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return Run(wall=wall, cpu=children_seconds() - before, peak=peak[0])


def children_seconds() -> float:
    """Return the seconds that the processes waited for have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree(process: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield process
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def resident(process: int) -> int:
    """Return the bytes of memory that a process holds; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def table_scores(path: Path) -> Any:
    """Return the subtasks' scores of a table, [documents, subtasks]."""
    table = pq.read_table(path)
    names = [name for name in table.column_names if name.startswith("score:")]
    return np.stack([table.column(name).to_numpy() for name in sorted(names)], axis=1)


def run_peer(corpus: Path, output: Path) -> int:
    """Score by rank_bm25 as the released selection code does."""
    import string

    from rank_bm25 import BM25Okapi

    marks = str.maketrans("", "", string.punctuation)

    def prepared(path: Path) -> Iterator[str]:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"].lower().replace("\n", " ").translate(marks)

    model = BM25Okapi([text.split(" ") for text in prepared(corpus)])
    queries = [" ".join(prepared(one)) for one in sorted((corpus.parent / "target").iterdir())]
    np.save(output, np.stack([model.get_scores(one.split(" ")) for one in queries], axis=1))
    return 0


def report(
    options: argparse.Namespace, size: int, words: int, runs: dict[str, Run], same: bool
) -> list[str]:
    """Return the result as Markdown lines."""
    rows = [
        ("neomix", options.documents, runs["whole"]),
        ("neomix", options.part, runs["part"]),
        ("rank_bm25", options.part, runs["peer"]),
    ]
    whole, part, peer = runs["whole"], runs["part"], runs["peer"]
    share = options.part / options.documents
    return [
        "# Selection by bm25",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()}-core {platform.machine()} CPU, "
        f"Python {platform.python_version()}, bm25s {version('bm25s')}, "
        f"rank_bm25 {version('rank_bm25')}.  One process, one thread; whole commands, start-up, "
        "reading and writing included.  Processes that wanted a core, on average over the "
        f"last 15 minutes, these among them: {os.getloadavg()[2]:.1f}.",
        "",
        f"{options.documents:,} documents of 20 to 60 words ({words:,} words, {size / 1e6:,.0f} MB "
        f"of JSON lines), {options.vocabulary:,} different words by Zipf's law; {SUBTASKS} "
        f"subtasks of {EXAMPLES} examples of {EXAMPLE_WORDS} words.",
        "",
        "Made by "
        f"`python benchmarks/selection.py --documents {options.documents} --part {options.part}`.",
        "",
        "| system | documents | wall, s | CPU, s | documents/s (wall) "
        "| peak memory of all processes, MiB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {count:,} | {run.wall:.1f} | {run.cpu:.1f} | {count / run.wall:,.0f} "
            f"| {run.peak / 2**20:,.0f} |"
            for name, count, run in rows
        ),
        "",
        f"- memory for {options.documents:,} documents: {whole.peak / 2**30:.2f} GiB, "
        f"{'under' if whole.peak < LIMIT_GIB * 2**30 else '**over**'} {LIMIT_GIB:.0f} GiB",
        f"- neomix against rank_bm25 on the same {options.part:,} documents: "
        f"**{peer.wall / part.wall:.1f} ×** by wall time, **{peer.cpu / part.cpu:.1f} ×** by CPU "
        "time, start-up included",
        f"- per document, neomix on {options.documents:,} against rank_bm25 on {options.part:,}: "
        f"**{peer.wall / share / whole.wall:.1f} ×** by wall time, "
        f"**{peer.cpu / share / whole.cpu:.1f} ×** by CPU time",
        "- wall times are those of a shared machine; CPU times are what to compare",
        f"- scores of the part: {'equal to the bit' if same else '**DIFFER**'}",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
