"""A corpus of this machine's own texts: Python's sources, manuals, documentation."""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron.tokenizer.train import train_byte_level_bpe


def make_corpus(path: Path, megabytes: float) -> Path:
    """Write documents of 0.5 to 6 kB as JSON lines, half code and half prose by bytes, shuffled."""
    rng = random.Random(0)
    code = _cut(_python_sources(), rng, megabytes * 5e5)
    prose = _cut(_documentation(), rng, megabytes * 5e5)
    documents = code + prose
    rng.shuffle(documents)
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
    return path


def texts(corpus: Path) -> Iterator[str]:
    """Yield the documents of a corpus."""
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_tokenizer(path: Path, corpus: Path, vocab_size: int) -> Path:
    """Train a byte-level BPE on a corpus; return its file."""
    train_byte_level_bpe(
        texts(corpus), path, vocab_size=vocab_size, special_tokens=["<|endoftext|>"]
    )
    return path


def _cut(sources: Iterator[str], rng: random.Random, limit: float) -> list[str]:
    pieces: list[str] = []
    for text in sources:
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


def _python_sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = _read(path)
            if text:
                yield text


def _documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for folder in ("/usr/share/doc", "/usr/share/man"):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                text = _read(path)
                if 200 <= len(text) < 400_000:
                    yield text


def _read(path: Path) -> str:
    """Return a file's text, unpacked; empty if it is none."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return ""
    return "" if "\0" in text else text
