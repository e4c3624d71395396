"""Mean loss per token under a language model, in nats: high where the model is surprised.

The model is a checkpoint of ours (--model RUN or RUN,ITERATION), a folder that transformers loads
(--model FOLDER), or a loss store that tools/score_data.py has made of a tokenised domain (--losses
STORE).  A document is read in windows of --window tokens, --stride apart; every token but the first
is predicted once, and the mean is over tokens, not over windows.  There is no target: train the
model on target texts first, and take the documents with the lowest scores (--order low), those in
the middle (mid) or the highest (top).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from megatron.errors import ConfigError
from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target
from megatron.selection.flags import positive, refuse_idle
from megatron.selection.language_model import (
    Ids,
    LanguageModel,
    document_tokens,
    is_transformers,
    model_identity,
    named_model,
)
from megatron.selection.windows import Window, fitted, windows

if TYPE_CHECKING:
    from megatron.selection.stored_losses import StoredLosses

_WINDOW, _STRIDE, _BATCH_TOKENS = 2048, 512, 8192
_CONVERTED = "model"
_OF_MODELS = ("window", "stride", "batch-tokens", "device", "dtype")


class _Piece(NamedTuple):
    """A window of one of the documents at hand."""

    document: int
    window: Window


class Perplexity:
    """Scores documents by their mean loss per token.

    A document's score does not depend on which documents it is scored with beyond the rounding of
    sums: about 1e-6 nats in float32.
    """

    method: ClassVar[str] = "ppl"
    aggregate: ClassVar[str] = "none"
    needs_targets: ClassVar[bool] = False

    def __init__(
        self,
        *,
        model: str | None = None,
        losses: str | None = None,
        window: int = _WINDOW,
        stride: int = _STRIDE,
        bos: bool = False,
        batch_tokens: int = _BATCH_TOKENS,
        device: str = "auto",
        dtype: str = "fp32",
    ) -> None:
        """Say what scores; nothing is loaded yet.

        Args:
            model: ``RUN``, ``RUN,ITERATION`` or a folder of transformers.
            losses: folder of a loss store, instead of a model.
            window: tokens that are looked at together, at most what the model reads.
            stride: between two windows.
            bos: put the tokenizer's first token before a document (or else the one that ends
                documents), so that the document's own first token is predicted too.
            batch_tokens: tokens that the model reads in one pass; decides memory, not scores.
            device: see :func:`megatron.selection.devices.choose_device`.
            dtype: number format of the weights.

        Raises:
            ConfigError: both or neither of model and store are given, or window and stride do not
                fit.
            DataError: there is no such folder.
        """
        if (model is None) == (losses is None):
            raise ConfigError(
                "ppl needs a model: give either --model (a run of ours, or a folder of "
                "transformers) or --losses (a store of tools/score_data.py)"
            )
        fitted(window, stride, None)
        if losses is not None and bos:
            raise ConfigError("--bos: a loss store has the losses of documents as they stand")
        self._given = None if model is None else named_model(model)
        self._losses = None if losses is None else Path(losses)
        self._window, self._stride, self._bos = window, stride, bos
        self._batch_tokens, self._device, self._dtype = batch_tokens, device, dtype
        self._model: LanguageModel | None = None
        self._store: StoredLosses | None = None

    def parameters(self) -> Mapping[str, Any]:
        """Return what decides the scores; the model by a hash of it."""
        if self._losses is not None:
            from megatron.selection.stored_losses import store_facts

            return dict(store_facts(self._losses))
        assert self._given is not None
        return {
            "model": model_identity(self._given),
            "window": self._window,
            "stride": self._stride,
            "bos": self._bos,
            "dtype": self._dtype,
        }

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Make the weights of a run readable by one process, or find a store's documents."""
        from megatron.selection.devices import choose_device

        if self._losses is not None:
            from megatron.selection.stored_losses import prepare_stored

            prepare_stored(self._losses, corpus, folder, say)
            return Cost()
        choose_device(self._device)
        assert self._given is not None
        if not is_transformers(self._given.path):
            from megatron.selection.model_ours import convert_ours, find_ours

            found = find_ours(self._given, verified=True, say=say)
            convert_ours(found, folder / _CONVERTED, say)
        return Cost()

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Load the model, or open the store."""
        from megatron.selection.devices import choose_device

        if self._losses is not None:
            from megatron.selection.stored_losses import StoredLosses

            self._store = StoredLosses(self._losses, folder)
            return
        assert self._given is not None
        device = choose_device(self._device)
        if is_transformers(self._given.path):
            from megatron.selection.model_transformers import TransformersModel

            self._model = TransformersModel(self._given.path, dtype=self._dtype, device=device)
        else:
            from megatron.selection.model_ours import OurModel, find_ours

            found = find_ours(self._given, verified=False, say=_silent)
            self._model = OurModel(
                found, cache=folder / _CONVERTED, dtype=self._dtype, device=device, say=_silent
            )

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Return [n, 1] mean losses in nats; NaN for a document without a predicted token.

        Raises:
            DataError: a document has tokens that the model or the store does not know.
        """
        if self._store is not None:
            return self._store.score(documents)[:, None], Cost()
        assert self._model is not None, "open() comes before score()"
        from megatron.selection.devices import enough_memory

        model = self._model
        tokens = [self._tokens(document, model) for document in documents]
        size, stride = fitted(self._window, self._stride, model.longest)
        pieces = [
            _Piece(number, window)
            for number, ids in enumerate(tokens)
            for window in windows(len(ids), size=size, stride=stride)
        ]
        sums, counts = np.zeros(len(documents)), np.zeros(len(documents))
        cost = Cost()
        for batch in batches(pieces, self._batch_tokens):
            rows = [tokens[one.document][one.window.start : one.window.stop] for one in batch]
            with enough_memory():
                lost = model.token_losses(rows)
            for one, losses in zip(batch, lost, strict=True):
                sums[one.document] += losses[-one.window.predicted :].sum()
                counts[one.document] += one.window.predicted
                read = one.window.read
                cost += Cost(flops=model.forward_flops(read), tokens=read)
        with np.errstate(invalid="ignore"):
            return (sums / counts)[:, None], cost

    def _tokens(self, document: Document, model: LanguageModel) -> Ids:
        tokens = document_tokens(document, model)
        if self._bos and tokens.size and (first := model.first_token) != tokens[0]:
            tokens = np.concatenate([[first], tokens])
        return tokens


def batches(pieces: Sequence[_Piece], tokens: int) -> Iterator[list[_Piece]]:
    """Yield pieces in batches of like lengths, the longest first.

    Args:
        pieces: windows of documents.
        tokens: that a batch may have, padding included; one piece is allowed whatever its length.
    """
    ordered = sorted(pieces, key=lambda one: (-one.window.read, one.document, one.window.start))
    batch: list[_Piece] = []
    for one in ordered:
        if batch and (len(batch) + 1) * batch[0].window.read > tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _silent(text: str) -> None:
    """Say nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    from megatron.selection.devices import add_device_arguments

    parser.add_argument("--model", metavar="RUN[,ITERATION]|FOLDER",
        help="a run of ours (its newest checkpoint, or that of an iteration), or a folder that "
        "transformers loads")  # fmt: skip
    parser.add_argument("--losses", metavar="STORE",
        help="per-token losses that tools/score_data.py made of a tokenised domain, instead of "
        "--model")  # fmt: skip
    parser.add_argument("--window", type=positive, default=_WINDOW, metavar="TOKENS",
        help="tokens looked at together, at most what the model reads (default: 2048)")  # fmt: skip
    parser.add_argument("--stride", type=positive, default=_STRIDE, metavar="TOKENS",
        help="from one window to the next (default: 512)")  # fmt: skip
    parser.add_argument("--bos", action="store_true",
        help="put the tokenizer's first token before every document, so that the document's own "
        "first token counts")  # fmt: skip
    parser.add_argument("--batch-tokens", type=positive, default=_BATCH_TOKENS, metavar="TOKENS",
        help="that the model reads in one pass; decides memory alone (default: 8192)")  # fmt: skip
    add_device_arguments(parser)


def from_options(options: argparse.Namespace) -> Perplexity:
    """Make the selector; see :class:`Perplexity` for the errors."""
    if options.losses is not None and options.model is None:
        flags = argparse.ArgumentParser()
        add_arguments(flags)
        refuse_idle(options, flags, _OF_MODELS, "--model, which a loss store stands in for")
    return Perplexity(
        model=options.model,
        losses=options.losses,
        window=options.window,
        stride=options.stride,
        bos=options.bos,
        batch_tokens=options.batch_tokens,
        device=options.device,
        dtype=options.dtype,
    )
