"""Sentence vectors by a local model folder of sentence-transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.checkpoint.files import hash_file
from megatron.errors import ConfigError, DataError, did_you_mean
from megatron.selection import libraries
from megatron.selection.base import Corpus, Cost, FloatArray, Say
from megatron.selection.encoder import TextOf

PURPOSE: Final = "--method embed with a model folder"


@dataclass(kw_only=True)
class SentenceEncoder:
    """Vectors by a model as sentence-transformers (or transformers, then averaged) saves it.

    The model runs whole, with its own pooling, projection and default prompt; the released code
    leaves the projection of its gtr-t5-base out.  Nothing is fetched from anywhere.

    Attributes:
        folder: of the model.
        max_length: tokens of a text that are read, or fewer where the model reads fewer.
        batch_size: texts of one pass, sorted by length; decides memory and the last bits.
        device: where it runs, see :func:`~megatron.selection.devices.choose_device`.
        dtype: number format of the weights.
    """

    folder: Path
    max_length: int = 256
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        """Check that the folder is there; raises ConfigError."""
        self._model: Any = None
        self._price = Price(per_token=0.0, per_text=0.0, width=0.0)
        if not self.folder.is_dir():
            raise ConfigError(
                f"--model {self.folder}: no such folder{did_you_mean(str(self.folder), ['lsa'])}; "
                "give one that sentence-transformers has saved, or lsa"
            )

    def parameters(self) -> Mapping[str, Any]:
        """Return what decides the vectors; the model by a hash of its files."""
        return {
            "encoder": "sentence-transformers",
            "model": self._identity,
            "max_length": self.max_length,
            "dtype": self.dtype,
        }

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and path.suffix != ".md" and not name.parts[0].startswith("."):
                _, content = hash_file(path)
                digest.update(f"{name.as_posix()} {content}\n".encode())
        return digest.hexdigest()

    def prepare(self, corpus: Corpus, text_of: TextOf, folder: Path, say: Say) -> None:
        """Do nothing: the model is prepared."""

    def open(self, folder: Path) -> None:
        """Load the model.

        Raises:
            DataError: sentence-transformers does not load the folder.
            MissingExtraError: it is not installed.
        """
        from megatron.selection.devices import DTYPES, choose_device

        if self._model is not None:
            return
        device = choose_device(self.device)
        library = libraries.load("sentence_transformers", PURPOSE)
        quiet = libraries.load("transformers", PURPOSE).logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        try:
            model = library.SentenceTransformer(
                str(self.folder),
                device=str(device),
                local_files_only=True,
                model_kwargs={"dtype": DTYPES[self.dtype]},
            )
        except Exception as error:  # whatever the library raises over a folder
            raise DataError(
                f"--model {self.folder}: sentence-transformers does not load it: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if _reads_tokens(model):
            model.max_seq_length = min(self.max_length, model.max_seq_length or self.max_length)
        self._price = price(model)
        self._model = model

    def encode(self, texts: Sequence[str]) -> tuple[FloatArray, Cost]:
        """Return vectors, and the operations of the forward pass over the tokens read."""
        if not texts:
            return np.empty((0, self._model.get_embedding_dimension() or 0)), Cost()
        vectors = self._model.encode(
            list(texts), batch_size=self.batch_size, show_progress_bar=False
        )
        lengths = self._lengths(texts)
        return np.asarray(vectors, dtype=np.float64), self._price.of(lengths)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens the model reads of each text."""
        if not _reads_tokens(self._model):
            return [0] * len(texts)
        prompt = self._model.prompts.get(self._model.default_prompt_name) or ""
        ids = self._model.tokenizer(
            [prompt + one for one in texts],
            truncation=True,
            max_length=self._model.max_seq_length,
            return_attention_mask=False,
        )["input_ids"]
        return [len(one) for one in ids]


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a forward pass of an encoder costs.

    Attributes:
        per_token: numbers of the matrices that every token goes through.
        per_text: of those that a text goes through once: a pooler, a projection of its vector.
        width: of attention, summed over layers: heads × width of a head.
    """

    per_token: float
    per_text: float
    width: float

    def of(self, lengths: Sequence[int]) -> Cost:
        """Return the cost of texts of so many tokens.

        ``2·(N_token·s + N_text) + 4·w·s²``: two operations per multiply-add of the matrices
        (Kaplan et al. 2020, section 2.1) and of attention, where every token sees every other.
        """
        tokens = sum(lengths)
        squares = sum(length * length for length in lengths)
        matrices = self.per_token * tokens + self.per_text * len(lengths)
        return Cost(flops=2.0 * matrices + 4.0 * self.width * squares, tokens=tokens)


def price(model: Any) -> Price:
    """Return the price of a model of sentence-transformers; embeddings cost nothing."""
    import torch

    tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for weight in module.parameters()
    }
    matrices = [
        (name, weight.numel())
        for name, weight in model.named_parameters()
        if weight.dim() >= 2 and id(weight) not in tables
    ]
    per_token = sum(size for name, size in matrices if _of_tokens(name))
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    return Price(
        per_token=float(per_token),
        per_text=float(sum(size for _, size in matrices) - per_token),
        width=_width(config) if config is not None else 0.0,
    )


def _reads_tokens(model: Any) -> bool:
    """Return whether a model begins with a transformer; others only look vectors up."""
    return hasattr(model[0], "auto_model")


def _of_tokens(name: str) -> bool:
    """Return whether a weight is of the encoder itself, not of what follows pooling."""
    return name.startswith("0.") and "pooler." not in name


def _width(config: Any) -> float:
    heads = getattr(config, "num_attention_heads", 0)
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    hidden = heads * head if head else getattr(config, "hidden_size", 0)
    return float(getattr(config, "num_hidden_layers", 0) * hidden)
