"""What scoring by a language model asks of one, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError
from megatron.selection.base import Document
from megatron.selection.text_form import plain_text

Losses = NDArray[np.float64]
Ids = NDArray[np.int64]
CONFIG_FILE = "config.json"
"""A folder with this file holds a model of transformers."""


class LanguageModel(Protocol):
    """A causal language model with its tokenizer.

    Attributes:
        longest: tokens that it reads at once; None for any number.
        vocab_size: token ids that it knows.
        tokenizer: SHA-256 (hex) of its tokenizer's files, as sidecars of data have it; None if
            there is nothing to compare with.
    """

    @property
    def longest(self) -> int | None: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def tokenizer(self) -> str | None: ...  # noqa: D102

    @property
    def first_token(self) -> int:
        """The token that stands before a text without a context.

        Raises:
            DataError: there is none.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, as the tokenizer's own settings make them."""
        ...

    def token_losses(self, rows: Sequence[Ids]) -> list[Losses]:
        """Return the losses in nats of every token but the first, row by row.

        Rows are padded at their ends, which nothing before them sees.

        Args:
            rows: [n] tokens each, n from 2 to ``longest`` + 1.
        """
        ...

    def forward_flops(self, length: int) -> float:
        """Return the operations of a forward pass over one sequence of ``length`` tokens."""
        ...


class Named(NamedTuple):
    """What a command line says of a model: a path, and the step of a checkpoint or None."""

    path: Path
    step: int | None


def named_model(given: str) -> Named:
    """Read ``RUN``, ``RUN,ITERATION`` or the folder of a transformers model.

    Raises:
        DataError: there is no such folder.
    """
    if Path(given).is_dir():
        return Named(Path(given), None)
    path, comma, step = given.rpartition(",")
    if comma and step.isdecimal() and Path(path).is_dir():
        return Named(Path(path), int(step))
    raise DataError(
        f"--model {given}: no such folder; give a run of ours (RUN, or RUN,ITERATION for one of "
        "its checkpoints), or a folder that transformers can load"
    )


def is_transformers(path: Path) -> bool:
    """Tell whether a folder holds a model of transformers, and not a run of ours."""
    return (path / CONFIG_FILE).is_file()


def model_identity(named: Named) -> str:
    """Return a hash (hex) of a model's weights; of another model it is another.

    Raises:
        CheckpointError: there is no model.
    """
    if is_transformers(named.path):
        from megatron.selection.model_folder import folder_identity

        return folder_identity(named.path)
    from megatron.selection.model_ours import find_ours

    return find_ours(named, verified=False, say=lambda text: None).identity


def document_tokens(document: Document, model: LanguageModel) -> Ids:
    """Return a document's tokens: its own, where the same tokenizer made them, else its text's.

    Raises:
        DataError: the model does not know one of them.
    """
    own = document.tokens
    if own is not None and document.tokenizer is not None and document.tokenizer == model.tokenizer:
        tokens = np.asarray(own, dtype=np.int64)
    else:
        tokens = np.asarray(model.encode(plain_text(document)), dtype=np.int64)
    check_known(tokens, model.vocab_size, document)
    return tokens


def check_known(tokens: NDArray[np.integer], vocab_size: int, document: Document) -> None:
    """Raise DataError if a model of so many token ids does not know one of a document's."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise DataError(
            f"{document.source}, document {document.number}: token id {int(tokens.max())}, and the "
            f"model has {vocab_size}; give the model that belongs to the tokenizer"
        )
