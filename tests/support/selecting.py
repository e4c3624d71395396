"""Small models for selection: ours, and the same exported, with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import exchange, local_tasks

from megatron.exchange.export import ExportOptions, export
from megatron.exchange.hf_import import import_hugging_face
from megatron.exchange.source import find_source
from megatron.selection.base import Document, Turn

VOCABULARY = 300


def quiet(text: str) -> None:
    """Take a line for the console."""


def make_models(
    folder: Path, keys: Mapping[str, Any], *, length: int = 48, seed: int = 3
) -> tuple[Path, Path]:
    """Return a run of ours that any layout can load, and its folder for transformers."""
    tokenizer = local_tasks.make_tokenizer(folder / "tokenizer.json")
    named = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer)}
    keys = {**keys, "vocab_size": VOCABULARY, "seq_length": length, **named}
    model = exchange.config(folder / "run", keys).model
    exchange.save(folder / "run", keys, exchange.random_weights(model, seed=seed))
    source = find_source(folder / "run", step=None, say=quiet)
    export(source, folder / "hf", ExportOptions(), say=quiet)
    import_hugging_face(folder / "hf", folder / "ours", say=quiet)
    return folder / "ours", folder / "hf"


def document(number: int, text: str, *turns: tuple[str, str]) -> Document:
    """Return a document of the source ``made``; turns are pairs of role and content."""
    return Document(
        id=f"made:{number}",
        source="made",
        number=number,
        text=text or "\n".join(content for _, content in turns),
        turns=tuple(Turn(role=role, content=content) for role, content in turns),
    )


class Made:
    """A corpus that is held in memory."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        return iter(self.documents[start:stop])

    def fingerprint(self) -> str:
        return str(hash(tuple(one.id + one.text for one in self.documents)))
