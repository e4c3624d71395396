"""Time tools/preprocess_data.py against the plain ``tokenizers`` path and GPT-NeoX's own.

All systems get the same JSONL and the same tokenizer.json, run pinned to one core with one
worker, turn by turn, and must write the same ``.bin``.  Wall time is of the whole command,
start-up included; CPU time is what the core spent on it, which other load disturbs less.

    python benchmarks/tokenize.py
    NEOX=/path/to/gpt-neox NEOX_PYTHON=/path/to/venv/bin/python python benchmarks/tokenize.py

Without ``--corpus`` and ``--tokenizer`` a corpus is made from this machine's Python sources and
documentation, and a byte-level BPE is trained on it.
"""

import sys
from pathlib import Path

# This file is called like a module of the standard library, which others must find instead.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import gzip
import hashlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version

from megatron.errors import DataError, run_command
from megatron.tokenizer.train import train_byte_level_bpe

ROOT = Path(__file__).resolve().parents[1]
OURS, PLAIN, NEOX = "neomix", "tokenizers", "GPT-NeoX"
SMALL_DOCUMENTS = 20


@dataclass
class System:
    """One way to tokenise, and what it took.

    Attributes:
        name: for the table.
        command: argument list; ``{input}`` and ``{output}`` are filled in.
        suffix: what the command adds to the output prefix.
        wall, cpu: seconds of each round.
        start_wall: seconds of the same command on a few documents.
        sha256: of the ``.bin``.
    """

    name: str
    command: list[str]
    suffix: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    start_wall: float = 0.0
    sha256: str = ""


def main() -> int:
    """Run the benchmark; 1 if the outputs differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", help="a JSONL with the field 'text'; default: made here")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: trained here")
    parser.add_argument("--megabytes", type=float, default=30.0, help="size of the corpus made")
    parser.add_argument("--vocab-size", type=int, default=50257, help="of the tokenizer trained")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each system")
    parser.add_argument("--core", type=int, default=0, help="the core to run on")
    parser.add_argument("--keep", metavar="FOLDER", help="keep corpus and tokenizer there")
    parser.add_argument("--report", metavar="FILE", help="write the result there as Markdown")
    parser.add_argument("--plain", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        return run_plain(*options.plain)
    with tempfile.TemporaryDirectory(prefix="tokenize-") as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = Path(options.corpus) if options.corpus else make_corpus(folder, options.megabytes)
        tokenizer = options.tokenizer or train(folder, corpus, options.vocab_size)
        systems = contestants(str(tokenizer))
        small = Path(temporary) / "small.jsonl"
        with open(corpus, encoding="utf-8") as file:
            small.write_text("".join(itertools.islice(file, SMALL_DOCUMENTS)))
        for system in systems:
            system.start_wall, _ = run(system, small, Path(temporary) / "small", options.core)
        for turn in range(options.rounds):
            for system in systems:
                wall, cpu = run(system, corpus, Path(temporary) / "out", options.core)
                system.wall.append(wall)
                system.cpu.append(cpu)
                print(f"round {turn + 1}: {system.name:10} {wall:6.2f} s, CPU {cpu:6.2f} s")
        lines = report(systems, corpus, str(tokenizer), options)
    print("\n" + "\n".join(lines))
    if options.report:
        Path(options.report).write_text("\n".join(lines) + "\n")
    return 0 if len({system.sha256 for system in systems}) == 1 else 1


def contestants(tokenizer: str) -> list[System]:
    """Return the systems to compare, ours first."""
    shared = ["--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer, "--append-eod",
              "--workers", "1", "--dataset-impl", "mmap", "--input", "{input}",
              "--output-prefix", "{output}"]  # fmt: skip
    systems = [
        System(OURS, [sys.executable, f"{ROOT}/tools/preprocess_data.py", *shared],
               "_text_document"),
        System(PLAIN, [sys.executable, __file__, "--plain", tokenizer, "{input}", "{output}"], ""),
    ]  # fmt: skip
    clone = os.environ.get("NEOX")
    if clone:
        script = Path(clone) / "tools" / "datasets" / "preprocess_data.py"
        if not script.exists():
            raise DataError(f"NEOX={clone}: {script} does not exist; name a clone of GPT-NeoX")
        python = os.environ.get("NEOX_PYTHON", sys.executable)
        neox = [python, str(script), *shared, "--log-interval", "1000"]
        systems.append(System(NEOX, neox, "_text_document"))
    return systems


def run(system: System, corpus: Path, output: Path, core: int) -> tuple[float, float]:
    """Run a system once on one core; return wall and CPU seconds."""
    for file in output.parent.glob(f"{output.name}*"):
        if file.suffix != ".jsonl":
            file.unlink()
    words = [word.format(input=corpus, output=output) for word in system.command]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    log = output.parent / "log.txt"
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {core})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.execve(words[0], words, environment)
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - started
    if status != 0:
        raise DataError(f"{system.name} failed:\n{log.read_text()[-3000:]}")
    system.sha256 = hashlib.sha256(Path(f"{output}{system.suffix}.bin").read_bytes()).hexdigest()
    return wall, usage.ru_utime + usage.ru_stime


def run_plain(tokenizer_file: str, corpus: str, output: str) -> int:
    """Tokenise as one would with ``tokenizers`` alone: read, encode in batches, write."""
    import numpy as np
    from tokenizers import Tokenizer

    from megatron.data.writer import TokenWriter

    tokenizer = Tokenizer.from_file(tokenizer_file)
    eod = tokenizer.token_to_id("<|endoftext|>")
    dtype = np.dtype("<u2") if tokenizer.get_vocab_size() < 65500 else np.dtype("<i4")
    with TokenWriter(output, dtype) as writer, open(corpus, encoding="utf-8") as file:
        for batch in batches(file, 1000):
            texts = [json.loads(line)["text"] for line in batch]
            for encoded in tokenizer.encode_batch_fast([text for text in texts if text]):
                writer.add(np.array([*encoded.ids, eod], dtype=dtype))
    return 0


def batches(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yield lines in lists of ``size``."""
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def make_corpus(folder: Path, megabytes: float) -> Path:
    """Write documents of 0.5 to 6 kB, half code and half prose by bytes, shuffled."""
    rng = random.Random(0)
    code = cut(python_sources(), rng, megabytes * 5e5)
    prose = cut(documentation(), rng, megabytes * 5e5)
    documents = code + prose
    rng.shuffle(documents)
    path = folder / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
    return path


def cut(texts: Iterator[str], rng: random.Random, limit: float) -> list[str]:
    """Return documents of 0.5 to 6 kB cut from texts, shuffled, about ``limit`` bytes of them."""
    pieces: list[str] = []
    for text in texts:
        at = 0
        while at < len(text):
            length = rng.randint(500, 6000)
            pieces.append(text[at : at + length])
            at += length
    rng.shuffle(pieces)
    total = 0
    for count, piece in enumerate(pieces):
        total += len(piece.encode())
        if total > limit:
            return pieces[: count + 1]
    return pieces


def python_sources() -> Iterator[str]:
    """Yield the source files of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = read(path)
            if text:
                yield text


def documentation() -> Iterator[str]:
    """Yield what this machine has of documentation: /usr/share/doc, manuals, Python's topics."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for folder in ("/usr/share/doc", "/usr/share/man"):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                text = read(path)
                if 200 <= len(text) < 400_000:
                    yield text


def read(path: Path) -> str:
    """Return a file's text, unpacked; empty if it is none."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return ""
    return "" if "\0" in text else text


def train(folder: Path, corpus: Path, vocab_size: int) -> Path:
    """Train a byte-level BPE on the corpus; return its file."""
    path = folder / "tokenizer.json"
    with open(corpus, encoding="utf-8") as file:
        texts = (json.loads(line)["text"] for line in file)
        size = train_byte_level_bpe(
            texts, path, vocab_size=vocab_size, special_tokens=["<|endoftext|>"]
        )
    print(f"trained a byte-level BPE of {size} ids")
    return path


def report(
    systems: list[System], corpus: Path, tokenizer: str, options: argparse.Namespace
) -> list[str]:
    """Return the result as Markdown lines."""
    size, documents, beyond_ascii = measure(corpus)
    ours = systems[0]
    lines = [
        "# Tokenising on one core",
        "",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()}-core {platform.machine()} CPU, "
        f"Python {platform.python_version()}, pinned to one core, one worker, {options.rounds} "
        "rounds, the systems turn by turn.",
        "",
        f"Corpus: {size / 1e6:.1f} MB of text in {documents:,} documents ({beyond_ascii:,} not "
        f"pure ASCII), SHA-256 {file_hash(corpus)[:16]}; byte-level BPE of "
        f"{vocabulary(tokenizer):,} ids, SHA-256 {file_hash(Path(tokenizer))[:16]}. "
        + "; ".join(versions(systems))
        + ".",
        "",
        "```",
        ("NEOX=… NEOX_PYTHON=… " if len(systems) > 2 else "")
        + f"python benchmarks/tokenize.py --rounds {options.rounds}",
        "```",
        "",
        "| system | wall, median s | CPU, median s | start-up, wall s | MB/s, whole command "
        "| MB/s, start-up aside |",
        "|---|---|---|---|---|---|",
    ]
    for system in systems:
        wall, cpu = statistics.median(system.wall), statistics.median(system.cpu)
        steady = size / 1e6 / max(wall - system.start_wall, 1e-9)
        lines.append(
            f"| {system.name} | {wall:.2f} | {cpu:.2f} | {system.start_wall:.2f} "
            f"| {size / 1e6 / wall:.1f} | {steady:.1f} |"
        )
    lines.append("")
    for peer in systems[1:]:
        wall = [theirs / own for theirs, own in zip(peer.wall, ours.wall, strict=True)]
        cpu = [theirs / own for theirs, own in zip(peer.cpu, ours.cpu, strict=True)]
        lines.append(
            f"- {ours.name} against {peer.name}: **{statistics.median(wall):.2f} ×** by wall time "
            f"(rounds {min(wall):.2f} to {max(wall):.2f}), **{statistics.median(cpu):.2f} ×** by "
            f"CPU time (rounds {min(cpu):.2f} to {max(cpu):.2f}), start-up included; "
            + ("`.bin` identical" if peer.sha256 == ours.sha256 else "**`.bin` DIFFERS**")
        )
    if len(systems) == 2:
        lines.append("- GPT-NeoX: not measured; name a clone by NEOX= (and NEOX_PYTHON=)")
    lines += ["", f"`.bin` SHA-256 {ours.sha256}"]
    return lines


def measure(corpus: Path) -> tuple[int, int, int]:
    """Return bytes of text, documents, and how many of them are not ASCII."""
    size = documents = beyond = 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            size += len(text.encode())
            documents += 1
            beyond += not text.isascii()
    return size, documents, beyond


def versions(systems: list[System]) -> Iterator[str]:
    """Yield what each system is made of."""
    yield f"Here: tokenizers {version('tokenizers')}, tiktoken {version('tiktoken')}"
    for system in systems[2:]:
        ask = "from importlib.metadata import version; print(version('tokenizers'))"
        library = output_of([system.command[0], "-c", ask])
        clone = Path(system.command[1]).parents[2]
        commit = output_of(["git", "-C", str(clone), "rev-parse", "--short", "HEAD"])
        yield f"{system.name} {commit} with tokenizers {library}"


def output_of(command: list[str]) -> str:
    """Return what a command prints, or a question mark."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "?"


def vocabulary(tokenizer: str) -> int:
    """Return the number of ids in a tokenizer.json."""
    return len(json.loads(Path(tokenizer).read_text(encoding="utf-8"))["model"]["vocab"])


def file_hash(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(run_command(main))
