"""The quickstart's data: seven domains made on this machine, without a network.

raw/DOMAIN/SPLIT.jsonl → tokenizer.json (byte-level BPE) → DOMAIN/SPLIT_text_document.{bin,idx}
→ manifest.json.  Every file appears whole or not at all, and the manifest comes last: a
second call finds it and does nothing, one after an interruption makes what is missing.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.corpora import arithmetic, library, records, unicode_names
from megatron.data.corpora.documents import (
    SPLITS,
    Document,
    RepeatFilter,
    split_documents,
    take_bytes,
    write_jsonl,
)
from megatron.data.corpora.tokenise import TokenizerChoice, tokenise
from megatron.errors import DataError
from megatron.tokenizer.train import train_byte_level_bpe

MANIFEST = "manifest.json"
VERSION = 1
VOCABULARY = 4096
# Every domain has the same say in the vocabulary.
VOCABULARY_BYTES_PER_DOMAIN = 1_000_000
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one domain is made.

    Attributes:
        documents: yields the domain's documents, the same ones every time on one Python.
        limit: bytes after which no more are taken.
    """

    documents: Callable[[], Iterator[Document]]
    limit: int


RECIPES: Mapping[str, Recipe] = {
    "code": Recipe(documents=library.code, limit=4_000_000),
    "docstrings": Recipe(documents=library.docstrings, limit=2_000_000),
    "manual": Recipe(documents=library.manual, limit=2_000_000),
    "bytecode": Recipe(documents=library.bytecode, limit=3_000_000),
    "unicode": Recipe(documents=unicode_names.characters, limit=2_500_000),
    "arithmetic": Recipe(documents=lambda: arithmetic.exercises(size=2_000_000), limit=2_000_000),
    "records": Recipe(documents=lambda: records.files(size=2_000_000), limit=2_000_000),
}


def prepare(root: Path, *, recipes: Mapping[str, Recipe] = RECIPES, say: Say = print) -> None:
    """Make the quickstart's token files under ``root``, or say that they are there.

    Args:
        root: folder that receives everything; made if absent.
        recipes: the domains by name.
        say: receives one line per step.

    Raises:
        DataError: this Python lacks a source, or what is in ``root`` was damaged since.
    """
    done = _finished(root)
    if done is not None:
        say(f"{root}: the quickstart's data is done ({done}); remove the folder to make it anew")
        return
    _make_texts(root, recipes, say)
    tokenizer = root / "tokenizer.json"
    if not tokenizer.exists():
        files = [root / "raw" / name / "train.jsonl" for name in recipes]
        say(f"training a byte-level BPE of {VOCABULARY} tokens")
        train_byte_level_bpe(_texts(files), tokenizer, vocab_size=VOCABULARY)
    choice = TokenizerChoice(kind="HFTokenizer", vocab_file=tokenizer)
    for name in recipes:
        for split in SPLITS:
            text = root / "raw" / name / f"{split}.jsonl"
            tokenise([text], root / name / split, choice)
        say(f"tokenised {name}")
    _finish(root, recipes)
    say(f"{root}: the quickstart's data is done")


def _make_texts(root: Path, recipes: Mapping[str, Recipe], say: Say) -> None:
    wanted = [root / "raw" / name / f"{split}.jsonl" for name in recipes for split in SPLITS]
    if all(path.exists() for path in wanted):
        return
    # One filter for all domains, so the texts are made together or not at all.
    unseen = RepeatFilter()
    for name, recipe in recipes.items():
        documents = list(take_bytes(unseen(recipe.documents()), recipe.limit))
        splits = split_documents(documents)
        for split, chosen in splits.items():
            write_jsonl(root / "raw" / name / f"{split}.jsonl", chosen)
        size = sum(document.size for document in documents)
        counts = " ".join(f"{split} {len(chosen)}" for split, chosen in splits.items())
        say(f"made {name}: {size / 1e6:.1f} MB of text in {len(documents)} documents ({counts})")


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        read = 0
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                text: str = json.loads(line)["text"]
                yield text
                read += len(text.encode())
                if read >= VOCABULARY_BYTES_PER_DOMAIN:
                    break


def _finish(root: Path, recipes: Mapping[str, Recipe]) -> None:
    files = [root / "tokenizer.json"]
    for name in recipes:
        for split in SPLITS:
            files += [root / name / f"{split}_text_document{end}" for end in (".bin", ".idx")]
    manifest = {
        "version": VERSION,
        "python": platform.python_version(),
        "domains": list(recipes),
        "files": {path.relative_to(root).as_posix(): path.stat().st_size for path in files},
    }
    partial = root / f"{MANIFEST}.tmp"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(root / MANIFEST)


def _finished(root: Path) -> str | None:
    """Return what is known of a finished folder, ``None`` of one to be made.

    Raises:
        DataError: the manifest stands, but not the files that it names.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, size in manifest["files"].items():
        file = root / name
        if not file.exists() or file.stat().st_size != size:
            raise DataError(
                f"{file} is not as it was made ({size} bytes expected); remove {root} and "
                "prepare the data again"
            )
    return f"{len(manifest['domains'])} domains, made by Python {manifest['python']}"
