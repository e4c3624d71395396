"""Labels that leave out what stands before a marker: for data of prompts and answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.reader import TokenReader
from megatron.data.samples import UNTRAINED
from megatron.data.writer import TokenWriter
from megatron.errors import DataError

_BLOCK_DOCUMENTS = 1 << 14


def write_labels(tokens: str, output: str, marker: Sequence[int], *, overwrite: bool) -> int:
    """Write labels beside a dataset: -100 up to the end of the first marker of each document.

    A document without the marker is trained on whole, as by GPT-NeoX's tool.

    Args:
        tokens: prefix of the dataset.
        output: prefix of the labels to write.
        marker: ids that follow each other at the end of what is not trained on.
        overwrite: replace what ``output`` holds.

    Returns:
        How many tokens are trained on.

    Raises:
        DataError: the dataset is unsound, or the output exists.
        RunError: the disk is full.
    """
    if not overwrite and os.path.exists(output + ".idx"):
        raise DataError(f"{output}.idx exists; give --overwrite to replace it")
    trained = 0
    with TokenReader(tokens) as reader, TokenWriter(output, "int32") as writer:
        for first in range(0, reader.num_documents, _BLOCK_DOCUMENTS):
            last = min(first + _BLOCK_DOCUMENTS, reader.num_documents)
            sizes = reader.document_sizes(first, last)
            read = reader.read(reader.document_start(first), reader.document_start(last))
            labels = mask_before(read, sizes, marker)
            trained += int((labels >= 0).sum())
            writer.add_many(labels, sizes)
    return trained


def mask_before(
    tokens: NDArray[Any], sizes: NDArray[Any], marker: Sequence[int]
) -> NDArray[np.int32]:
    """Return labels of documents laid end to end.

    Args:
        tokens: [n] ids of all documents.
        sizes: [d] tokens of each.
        marker: see :func:`write_labels`.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - sizes
    length = len(marker)
    found = np.ones(max(len(tokens) - length + 1, 0), dtype=np.bool_)
    for place, token in enumerate(marker):
        found &= tokens[place : place + len(found)] == token
    matches = np.flatnonzero(found)
    next_match = np.searchsorted(matches, starts)
    at = np.append(matches, len(tokens))[next_match] + length
    # A marker that reaches over the document's end is none of its own.
    masked = np.where(at <= ends, at, starts)
    before = np.repeat(masked, sizes)
    labels = tokens.astype(np.int32)
    labels[np.arange(len(tokens)) < before] = UNTRAINED
    return labels
