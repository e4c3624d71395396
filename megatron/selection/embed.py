"""Cosine similarity of every document's vector to those of each target subtask.

Vectors come from a local model folder of sentence-transformers (``--model FOLDER``) or from latent
semantic analysis of the corpus itself (``--model lsa``), which needs no model.  Texts are prepared
as for ``bm25`` (released; ``--text raw`` leaves them as they are), and of a chat the first message
is read (released; ``--messages all``).

A subtask scores the mean of the cosines to its examples.  The released code (Yin and Rush 2024,
arXiv 2410.16208) joins a subtask's examples to one text instead, of which the encoder reads the
first 256 tokens and so leaves most examples out; ``--examples joined`` does the same.  Over
subtasks the mean is taken (released) or the maximum.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from megatron.checkpoint.files import replace_file, replacing
from megatron.errors import ConfigError
from megatron.selection import libraries
from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target
from megatron.selection.encoder import Encoder
from megatron.selection.flags import positive, refuse_idle
from megatron.selection.lsa import PURPOSE as PURPOSE_OF_LSA
from megatron.selection.lsa import LsaEncoder
from megatron.selection.sentence_encoder import PURPOSE as PURPOSE_OF_MODEL
from megatron.selection.sentence_encoder import SentenceEncoder
from megatron.selection.words import (
    EXAMPLES,
    FIELDS,
    add_text_arguments,
    check_choice,
    example_texts,
    field_text,
    prepare,
)

TEXTS: Final = ("prepared", "raw")
"""How a text comes to the encoder: prepared as for ``bm25``, or as it is."""

_TARGETS, _COST = "targets.npy", "targets.json"
_TEXTS_AT_ONCE: Final = 1024

_OF_MODELS: Final = ("max-length", "batch-size", "device", "dtype")
_OF_LSA: Final = ("lsa-dimensions", "lsa-features", "lsa-documents", "seed")


@dataclass(kw_only=True)
class Embed:
    """Scores by the angle between vectors.

    Attributes:
        encoder: that makes the vectors.
        messages: what of a chat is read, see :data:`~megatron.selection.words.FIELDS`.
        text: one of :data:`TEXTS`.
        examples: how those of a subtask are taken together.
        aggregate: over the subtasks, "mean" (released) or "max".
    """

    encoder: Encoder
    messages: str = "first"
    text: str = "prepared"
    examples: str = "mean"
    aggregate: str = "mean"
    method: ClassVar[str] = "embed"
    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the values; raises ConfigError."""
        self._targets: FloatArray | None = None
        check_choice("--messages", self.messages, FIELDS)
        check_choice("--text", self.text, TEXTS)
        check_choice("--examples", self.examples, EXAMPLES)
        check_choice("--aggregate", self.aggregate, ("mean", "max"))

    def parameters(self) -> Mapping[str, Any]:
        """Return all that decides the scores beside corpus and targets."""
        own = {name: getattr(self, name) for name in ("messages", "text", "examples", "aggregate")}
        return own | dict(self.encoder.parameters())

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Fit the encoder, where it needs that, and embed the targets into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.prepare(corpus, self._text, folder, say)
        if not (folder / _COST).exists():
            self.encoder.open(folder)
            vectors, cost = self._embedded(targets)
            with replacing(folder / _TARGETS) as out:
                np.save(out, vectors)
            replace_file(folder / _COST, json.dumps(asdict(cost)).encode())
        return Cost(**json.loads((folder / _COST).read_bytes()))

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Get encoder and target vectors."""
        self.encoder.open(folder)
        self._targets = np.load(folder / _TARGETS)

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Return [n, subtasks] cosines, NaN for documents without a word.

        A document that the encoder knows nothing of has the vector 0, and scores 0.
        """
        if self._targets is None:
            raise RuntimeError("open comes before score")
        texts = [self._text(one) for one in documents]
        kept = [at for at, one in enumerate(texts) if one.strip()]
        found = np.full((len(documents), len(self._targets)), np.nan)
        vectors, cost = self.encoder.encode([texts[at] for at in kept])
        if kept:
            found[kept] = unit(vectors) @ self._targets.T
        return found, cost

    def _text(self, document: Document) -> str:
        return self._prepared(field_text(document, self.messages))

    def _prepared(self, text: str) -> str:
        return prepare(text) if self.text == "prepared" else text

    def _embedded(self, targets: Sequence[Target]) -> tuple[FloatArray, Cost]:
        """Return [subtasks, dimensions]: the mean of the unit vectors of a subtask's examples."""
        rows, cost = [], Cost()
        for one in targets:
            texts = example_texts(one)
            if self.examples == "joined":
                texts = ["\n".join(texts)]
            total: FloatArray | float = 0.0
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                batch = [self._prepared(text) for text in texts[start : start + _TEXTS_AT_ONCE]]
                vectors, price = self.encoder.encode(batch)
                total = total + unit(vectors).sum(axis=0)
                cost = cost + price
            rows.append(total / len(texts))
        return np.stack(rows), cost


def unit(vectors: FloatArray) -> FloatArray:
    """Return vectors of length 1 in the same directions; 0 stays 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: FloatArray = vectors / np.where(lengths > 0, lengths, 1.0)
    return directions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    from megatron.selection.devices import add_device_arguments

    defaults = LsaEncoder()
    parser.add_argument("--model", metavar="FOLDER|lsa",
        help="a local model folder of sentence-transformers, or lsa: no model, hashed TF-IDF and "
        "an SVD of the corpus (a folder of that name: ./lsa)")  # fmt: skip
    add_text_arguments(parser, examples="mean")
    parser.add_argument("--text", choices=TEXTS, default="prepared",
        help="embed texts in lower case and without punctuation, or as they are (default: "
        "prepared)")  # fmt: skip
    parser.add_argument("--max-length", type=positive, default=256, metavar="TOKENS",
        help="of a text that the model reads (default: 256)")  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, metavar="TEXTS",
        help="that the model reads in one pass (default: 64)")  # fmt: skip
    add_device_arguments(parser)
    parser.add_argument("--lsa-dimensions", type=positive, default=defaults.dimensions,
        metavar="N", help=f"of a vector (default: {defaults.dimensions})")  # fmt: skip
    parser.add_argument("--lsa-features", type=positive, default=defaults.features,
        metavar="N", help=f"that words are hashed to (default: {defaults.features})")  # fmt: skip
    parser.add_argument("--lsa-documents", type=positive, default=defaults.documents,
        metavar="N", help="of the corpus, at even distances, that the SVD is fitted on "
        f"(default: {defaults.documents})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N",
        help="of the SVD (default: 0)")  # fmt: skip


def from_options(options: argparse.Namespace) -> Embed:
    """Make the selector."""
    if options.model is None:
        raise ConfigError("--method embed needs --model: a model folder, or lsa")
    encoder: Encoder
    flags = argparse.ArgumentParser()
    add_arguments(flags)
    if options.model == "lsa":
        refuse_idle(options, flags, _OF_MODELS, "--model with a folder")
        libraries.load("sklearn", PURPOSE_OF_LSA)
        encoder = LsaEncoder(
            dimensions=options.lsa_dimensions,
            features=options.lsa_features,
            documents=options.lsa_documents,
            seed=options.seed,
        )
    else:
        refuse_idle(options, flags, _OF_LSA, "--model lsa")
        libraries.load("sentence_transformers", PURPOSE_OF_MODEL)
        encoder = SentenceEncoder(
            folder=Path(options.model),
            max_length=options.max_length,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
        )
    return Embed(
        encoder=encoder,
        messages=options.messages,
        text=options.text,
        examples=options.examples,
        aggregate=options.aggregate,
    )
