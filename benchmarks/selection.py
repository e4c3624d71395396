"""Score short documents by bm25, and a part of them by rank_bm25 as well.

The documents are made here: words drawn by Zipf's law.  ``tools/select_data.py score`` runs as a
user runs it; memory is that of its whole process tree.  rank_bm25, which holds every document's
frequencies and passes over all of them for every word of a query, scores a part, in turns with
ours; on that both must give the same numbers to the bit.  The whole corpus is scored once.

    python benchmarks/selection.py
    python benchmarks/selection.py --documents 1000000 --part 20000
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.support.commands import ROOT, Ran, figures, race, run, times
from benchmarks.support.measure import compared, machine, rounded, shown, write

SUBTASKS, EXAMPLES, EXAMPLE_WORDS = 4, 5, 100
LIMIT_GIB = 4.0


def main() -> None:
    """Run the comparison, print it and write it.

    Raises:
        SystemExit: the scores differ, or the memory is more than is allowed.
    """
    options = _options()
    if options.peer:
        return run_peer(*map(Path, options.peer))
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="selection-", dir=options.folder) as temporary:
        folder = Path(temporary)
        corpus, part = folder / "corpus.jsonl", folder / "part.jsonl"
        words = make(folder, options)
        with open(corpus, encoding="utf-8") as lines, open(part, "w", encoding="utf-8") as file:
            file.writelines(itertools.islice(lines, options.part))
        size = corpus.stat().st_size
        whole = run(ours(folder, corpus, "whole"), environment=environment)
        theirs = [sys.executable, __file__, "--peer", str(part), str(folder / "peer.npy")]

        def we() -> Ran:
            for file in folder.glob("part.parquet*"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            return run(ours(folder, part, "part"), environment=environment)

        contestants = {"neomix": we, "rank_bm25": lambda: run(theirs, environment=environment)}
        found = race(contestants, turns=options.turns)
        peer = np.load(folder / "peer.npy")
        assert np.array_equal(table_scores(folder / "part.parquet"), peer), "the scores differ"
    assert whole.peak < LIMIT_GIB * 2**30, f"{whole.peak / 2**30:.1f} GiB"
    ratio = compared(times(found["rank_bm25"]), times(found["neomix"]))
    print(
        f"{options.documents:,} documents: {whole.wall:.1f} s, processors {whole.processor:.1f} s, "
        f"{whole.peak / 2**20:,.0f} MiB; {options.part:,} documents: rank_bm25's time / ours "
        f"{shown(ratio['processor'])}, by the clock {shown(ratio['wall'])}; same scores"
    )
    content = {
        "benchmark": "selection",
        "command": "python benchmarks/selection.py",
        "machine": machine("bm25s", "rank_bm25", "numpy"),
        "settings": {
            "turns": options.turns,
            "vocabulary": options.vocabulary,
            "subtasks": SUBTASKS,
            "examples": EXAMPLES,
            "example_words": EXAMPLE_WORDS,
        },
        "whole": {
            "documents": options.documents,
            "words": words,
            "bytes": size,
            "wall_seconds": rounded(whole.wall),
            "processor_seconds": rounded(whole.processor),
            "peak_bytes": rounded(whole.peak),
        },
        "part": {
            "documents": options.part,
            "contestants": {name: figures(runs) for name, runs in found.items()},
            "rank_bm25_over_ours": ratio,
        },
    }
    if options.write:
        print(f"wrote {write('selection', content)}")


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


def table_scores(path: Path) -> Any:
    """Return the subtasks' scores of a table, [documents, subtasks]."""
    table = pq.read_table(path)
    names = [name for name in table.column_names if name.startswith("score:")]
    return np.stack([table.column(name).to_numpy() for name in sorted(names)], axis=1)


def run_peer(corpus: Path, output: Path) -> None:
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--documents", type=int, default=200_000, help="of the corpus")
    parser.add_argument("--part", type=int, default=10_000, help="documents for rank_bm25")
    parser.add_argument("--vocabulary", type=int, default=300_000, help="different words")
    parser.add_argument("--turns", type=int, default=3, help="of both on the part")
    parser.add_argument("--folder", help="where the corpus is made (default: a temporary one)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
