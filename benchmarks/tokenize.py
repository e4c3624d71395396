"""Time tools/preprocess_data.py against Hugging Face tokenizers, megatron-core and GPT-NeoX.

All get the same JSON lines and the same tokenizer.json, take turns as whole commands, start-up
included, with one worker on one core and with two on two, and must write the same ``.bin`` and
``.idx``.  The peers: a plain loop of ``tokenizers``; Megatron-LM's way, a pool of processes that
encode document by document and megatron-core's index builder; and GPT-NeoX's own script from a
clone, where one is given.  What libraries take to encode texts that lie in memory, and
nothing else, is measured by itself.

    python benchmarks/tokenize.py
    python benchmarks/tokenize.py --neox CLONE --neox-python CLONE/.venv/bin/python

Without ``--corpus`` and ``--tokenizer`` a corpus is made of this machine's Python sources and
documentation, and a byte-level BPE is trained on it.
"""

from __future__ import annotations

import os
import sys

# This file is called like a module of the standard library, which others must find instead.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support.commands import ROOT, Ran, figures, race, run, times
from benchmarks.support.corpus import make_corpus, texts, train_tokenizer
from benchmarks.support.measure import Times, compared, machine, rounded, shown, spread, write
from benchmarks.support.measure import race as race_here

OURS, PLAIN, CORE, NEOX = "neomix", "tokenizers", "megatron-core", "GPT-NeoX"
_SMALL_DOCUMENTS = 20
_BATCH = 1000


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    if options.peer:
        return _PEERS[options.peer[0]](*options.peer[1:])
    with tempfile.TemporaryDirectory(prefix="tokenize-") as name:
        folder = Path(name)
        corpus = Path(options.corpus or make_corpus(folder / "corpus.jsonl", options.megabytes))
        tokenizer = options.tokenizer or train_tokenizer(
            folder / "tokenizer.json", corpus, options.vocab_size
        )
        small = folder / "small.jsonl"
        with open(corpus, encoding="utf-8") as file:
            small.write_text("".join(itertools.islice(file, _SMALL_DOCUMENTS)))
        found = list(texts(corpus))
        size = sum(len(text.encode()) for text in found)
        results = [
            _compare(workers, (corpus, small), Path(tokenizer), size, options)
            for workers in options.workers
        ]
        alone = json.loads(
            run([sys.executable, __file__, "--peer", "alone", tokenizer, corpus]).output
        )
    content = {
        "benchmark": "tokenize",
        "command": "python benchmarks/tokenize.py" + (" --neox CLONE" if options.neox else ""),
        "machine": machine("tokenizers", "tiktoken", "megatron-core", "numpy"),
        "settings": {"turns": options.turns, "vocab_size": options.vocab_size},
        "neox": _commit(options.neox),
        "corpus": {
            "bytes": size,
            "documents": len(found),
            "not_ascii": sum(not text.isascii() for text in found),
        },
        "results": results,
        "scaling": _scaling(results),
        "in_memory_megabytes_per_second": {
            name: spread([size / 1e6 / one for one in seconds]) for name, seconds in alone.items()
        },
    }
    for name, rate in content["in_memory_megabytes_per_second"].items():
        print(f"{name}, texts in memory: {shown(rate, 1)} MB/s")
    if options.write:
        print(f"wrote {write('tokenize', content)}")


def _compare(
    workers: int,
    corpora: tuple[Path, Path],
    tokenizer: Path,
    size: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Let all systems tokenise with so many workers."""
    hashes: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory(prefix="tokenize-") as name:
        prefix = Path(name) / "out"

        def runs(system: str, corpus: Path) -> Callable[[], Ran]:
            def call() -> Ran:
                for file in Path(name).iterdir():
                    file.unlink()
                command, written = _command(system, corpus, prefix, tokenizer, workers, options)
                ran = run(command, cores=_cores(workers), environment=_environment(workers))
                if corpus == corpora[0]:
                    hashes.setdefault(system, set()).add(_hash(written))
                return ran

            return call

        systems = [OURS, PLAIN, CORE, *([NEOX] if options.neox else [])]
        start = {system: runs(system, corpora[1])() for system in systems}
        found = race({system: runs(system, corpora[0]) for system in systems}, turns=options.turns)
    assert all(one == hashes[OURS] and len(one) == 1 for one in hashes.values()), hashes
    rows: dict[str, Any] = {}
    for system, turns in found.items():
        wall = statistics.median(one.wall for one in turns)
        steady = [size / 1e6 / max(one.wall - start[system].wall, 1e-3) for one in turns]
        work = [size / 1e6 / max(one.processor - start[system].processor, 1e-3) for one in turns]
        rows[system] = {
            **figures(turns),
            "start_wall_seconds": rounded(start[system].wall),
            "start_processor_seconds": rounded(start[system].processor),
            "megabytes_per_second": rounded(size / 1e6 / wall),
            "megabytes_per_second_start_aside": spread(steady),
            "megabytes_per_core_second_start_aside": spread(work),
            "time_over_ours": compared(times(turns), times(found[OURS])),
        }
        print(
            f"{workers} workers, {system}: {rows[system]['megabytes_per_second']:.1f} MB/s, time / "
            f"ours {shown(rows[system]['time_over_ours']['processor'])} by processors, "
            f"{shown(rows[system]['time_over_ours']['wall'])} by the clock; same files",
            flush=True,
        )
    return {"workers": workers, "sha256": min(hashes[OURS]), "contestants": rows}


def _command(
    system: str,
    corpus: Path,
    prefix: Path,
    tokenizer: Path,
    workers: int,
    options: argparse.Namespace,
) -> tuple[list[str], str]:
    """Return a system's command, and the prefix of what it writes."""
    python, count = sys.executable, str(workers)
    if system in (PLAIN, CORE):
        words = [python, __file__, "--peer", system, tokenizer, corpus, prefix, count]
        return [str(word) for word in words], str(prefix)
    shared = [
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", str(tokenizer), "--append-eod"),
        *("--workers", count, "--dataset-impl", "mmap", "--input", str(corpus)),
        *("--output-prefix", str(prefix), "--log-interval", "1000"),
    ]
    program = [python, str(ROOT / "tools/preprocess_data.py")]
    if system == NEOX:
        clone = Path(options.neox).resolve()
        program = [options.neox_python, str(clone / "tools/datasets/preprocess_data.py")]
    return [*program, *shared], f"{prefix}_text_document"


def _cores(workers: int) -> list[int]:
    return sorted(os.sched_getaffinity(0))[:workers]


def _environment(workers: int) -> dict[str, str]:
    parallel = {"RAYON_NUM_THREADS": str(workers)} if workers > 1 else {}
    return {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **parallel}


def _hash(prefix: str) -> str:
    total = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        total.update(Path(prefix + suffix).read_bytes())
    return total.hexdigest()


def _scaling(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how much more a core second gives with the most workers than with one."""
    first, last = results[0], results[-1]
    name = "megabytes_per_core_second_start_aside"
    return {
        system: {
            "workers": last["workers"],
            "wall_ratio": rounded(
                row["wall_seconds"]["median"]
                / last["contestants"][system]["wall_seconds"]["median"]
            ),
            "rate_per_core_kept": rounded(
                last["contestants"][system][name]["median"] / row[name]["median"]
            ),
        }
        for system, row in first["contestants"].items()
    }


def _commit(clone: str | None) -> str | None:
    if clone is None:
        return None
    return run(["git", "-C", clone, "rev-parse", "--short", "HEAD"]).output.strip()


def _run_plain(tokenizer_file: str, corpus: str, prefix: str, workers: str) -> None:
    """Tokenise as one would with ``tokenizers`` alone, whose threads are as many as workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if int(workers) > 1 else "false"
    import numpy as np
    from tokenizers import Tokenizer

    from megatron.data.writer import TokenWriter

    tokenizer = Tokenizer.from_file(tokenizer_file)
    eod = tokenizer.token_to_id("<|endoftext|>")
    dtype = np.dtype("<u2") if tokenizer.get_vocab_size() < 65500 else np.dtype("<i4")
    lines = texts(Path(corpus))
    with TokenWriter(prefix, dtype) as writer:
        while batch := list(itertools.islice(lines, _BATCH)):
            for encoded in tokenizer.encode_batch_fast([text for text in batch if text]):
                writer.add(np.array([*encoded.ids, eod], dtype=dtype))


_encoder: Any = None


def _begin(tokenizer_file: str) -> None:
    global _encoder
    from tokenizers import Tokenizer

    _encoder = Tokenizer.from_file(tokenizer_file)


def _encode_line(line: str) -> list[int]:
    text = json.loads(line)["text"]
    return [*_encoder.encode(text).ids, _encoder.token_to_id("<|endoftext|>")] if text else []


def _run_core(tokenizer_file: str, corpus: str, prefix: str, workers: str) -> None:
    """Tokenise in Megatron-LM's way: a pool, a document a call, megatron-core's builder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import multiprocessing

    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    _begin(tokenizer_file)
    small = _encoder.get_vocab_size() < 65500
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if small else np.int32)
    with (
        multiprocessing.Pool(int(workers), initializer=_begin, initargs=(tokenizer_file,)) as pool,
        open(corpus, encoding="utf-8") as file,
    ):
        for ids in pool.imap(_encode_line, file, 32):
            if ids:
                builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _run_alone(tokenizer_file: str, corpus: str) -> None:
    """Print seconds of encoding texts in memory: tiktoken, ours at first, ours from then on."""
    import numpy as np
    import tiktoken

    from megatron.tokenizer.build import build_tokenizer
    from megatron.tokenizer.bytelevel import parse_byte_level
    from megatron.tokenizer.fast import FastEncoder
    from megatron.tokenizer.huggingface import HuggingFaceTokenizer

    ours = build_tokenizer("HFTokenizer", tokenizer_file)
    assert isinstance(ours, HuggingFaceTokenizer)
    parts = parse_byte_level(ours.library.to_str())
    ranks = {bytes((byte,)): byte for byte in range(256)}
    for left, right, _ in parts.merges:
        ranks.setdefault(left + right, len(ranks))
    theirs = tiktoken.Encoding(
        "theirs",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=ranks,
        special_tokens={},
    )
    found, dtype = list(texts(Path(corpus))), np.dtype("<i4")

    def encoder() -> FastEncoder:
        return FastEncoder(parts, ours.library, ours.encode_raw_by_library)

    warm, cold = encoder(), iter([encoder() for _ in range(4)])
    warm.encode_raw(found, dtype)
    contestants: dict[str, Callable[[], Any]] = {
        "tiktoken": lambda: [theirs.encode_ordinary(text) for text in found],
        "neomix, the first texts": lambda: next(cold).encode_raw(found, dtype),
        "neomix, later texts": lambda: warm.encode_raw(found, dtype),
    }
    done: dict[str, Times] = race_here(contestants, turns=3)
    print(json.dumps({name: one.processor for name, one in done.items()}))


_PEERS: dict[str, Callable[..., None]] = {
    PLAIN: _run_plain,
    CORE: _run_core,
    "alone": _run_alone,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", help="JSON lines with the field 'text'; default: made here")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: trained here")
    parser.add_argument("--megabytes", type=float, default=30.0, help="size of the corpus made")
    parser.add_argument("--vocab-size", type=int, default=50257, help="of the tokenizer trained")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--neox", metavar="CLONE", help="a clone of GPT-NeoX, to compare with")
    parser.add_argument("--neox-python", default=sys.executable, help="Python that runs it")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    parser.add_argument("--peer", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
