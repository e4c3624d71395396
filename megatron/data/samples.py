"""Samples read: rows of S+1 tokens, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.data.batch import check_token_ids
from megatron.data.infilling import Infilling
from megatron.data.reader import TokenReader

UNTRAINED: Final = -100
"""Label of a token that is not trained on, as GPT-NeoX's tools write it."""
PADDING: Final = 0
"""Token in what a window does not fill."""


class Place(NamedTuple):
    """Where a sample lies, and what becomes of it.

    Attributes:
        reader: of the tokens.
        start: first token.
        stop: behind the last; at most S + 1 tokens.
        labels: the labels of the same documents; None where every token is its own.
        infilling: rearranges the sample; None leaves it as it is.
        name: the domain's, for ``infilling``.
        epoch: pass over the domain, for ``infilling``.
        sample: place in the order of that pass, for ``infilling``.
    """

    reader: TokenReader
    start: int
    stop: int
    labels: TokenReader | None = None
    infilling: Infilling | None = None
    name: str = ""
    epoch: int = 0
    sample: int = 0

    def announce(self) -> None:
        """Tell the kernel that the sample will be read soon."""
        self.reader.will_need(self.start, self.stop)
        if self.labels is not None:
            self.labels.will_need(self.start, self.stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Rows of tokens.

    Attributes:
        tokens: [n, S+1] ids; padding is 0.
        labels: [n, S] int64, the target behind each of the first S tokens, negative where it is
            not trained on; None where every token is the target of the one before it.
    """

    tokens: NDArray[Any]
    labels: NDArray[np.int64] | None = None

    def cut(self, length: int) -> Samples:
        """Return the same rows with ``length`` inputs each."""
        labels = None if self.labels is None else self.labels[:, :length]
        return Samples(tokens=self.tokens[:, : length + 1], labels=labels)

    def counted(self, masked_token: int | None) -> NDArray[np.int64]:
        """Return per row the number of targets that the loss counts, [n].

        Args:
            masked_token: the loss is masked wherever this is the *input*; None = nowhere.
        """
        inputs = self.tokens[:, :-1]
        if masked_token is None and self.labels is None:
            return np.full(len(inputs), inputs.shape[1], dtype=np.int64)
        trained = np.ones(inputs.shape, dtype=np.bool_) if self.labels is None else self.labels >= 0
        if masked_token is not None:
            trained = trained & (inputs != masked_token)
        counts: NDArray[np.int64] = np.count_nonzero(trained, axis=1)
        return counts


def read_samples(places: Sequence[Place], seq_length: int) -> Samples:
    """Read samples and do to them what their places say.

    Args:
        places: n samples.
        seq_length: S.

    Returns:
        The rows, tokens in the narrowest type that holds those of all readers.

    Raises:
        DataError: a file cannot be read, or labels do not fit their tokens.
    """
    moved = [place for place in places if place.infilling is not None]
    dtypes = {place.reader.dtype for place in places} | ({np.dtype(np.int64)} if moved else set())
    shape = (len(places), seq_length + 1)
    tokens = np.empty(shape, dtype=np.result_type(*dtypes, np.uint8))
    labels: NDArray[np.int64] | None = None
    if moved or any(p.labels is not None or p.stop - p.start < shape[1] for p in places):
        labels = np.empty((len(places), seq_length), dtype=np.int64)
    for row, place in enumerate(places):
        own = tokens[row, : place.stop - place.start]
        if own.dtype == place.reader.dtype:
            place.reader.read_into(own, place.start)
        else:
            own[:] = place.reader.read(place.start, place.stop)
        tokens[row, len(own) :] = PADDING
        if labels is not None:
            _label(labels[row], own, place)
    return Samples(tokens=tokens, labels=labels)


def _label(labels: NDArray[np.int64], tokens: NDArray[Any], place: Place) -> None:
    """Fill a row of labels [S], rearranging its tokens first where that is asked for."""
    labels[:] = UNTRAINED
    own = labels[: len(tokens) - 1]
    if place.infilling is not None:
        starts = place.reader.document_starts(place.start, place.stop) - place.start
        tokens[:], padding = place.infilling.apply(
            tokens, starts, domain=place.name, epoch=place.epoch, sample=place.sample
        )
        own[:] = tokens[1:]
        own[padding[1:]] = UNTRAINED
    elif place.labels is not None:
        own[:] = place.labels.read(place.start, place.stop)[1:]
    else:
        own[:] = tokens[1:]


def check_samples(samples: Samples, names: Sequence[str], vocab_size: int | None) -> None:
    """Refuse ids that have no row in the embedding, which on a device would be a bare assertion.

    Args:
        samples: n rows.
        names: of the n rows' domains.
        vocab_size: ids lie below it; ``None`` checks for negative ones only.

    Raises:
        DataError: naming the domain, the id and the vocabulary.
    """
    check_token_ids(samples.tokens, names, vocab_size)
    if samples.labels is not None:
        trained = np.maximum(samples.labels, 0)
        check_token_ids(trained, names, vocab_size, what="label")
