"""What a domain is made of: ranges of whole documents, and their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.data.reader import TokenReader
from megatron.data.splits import DocumentRange, document_range, split_documents
from megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A range of whole documents of one prefix, and where their labels are, if there are any."""

    reader: TokenReader
    documents: DocumentRange
    labels: TokenReader | None = None

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
        if self.labels is not None:
            self.labels.close()


def open_source(path: str, labels: str | None, split: tuple[str, str] | None) -> Source:
    """Open a prefix, or a part of it, and its labels.

    Args:
        path: prefix of the tokens.
        labels: prefix of the labels; None = every token is trained on.
        split: ``(shares, part)``; ``None`` takes all of it.

    Raises:
        DataError: a file is missing or unsound, or the labels are not of the same documents.
        ConfigError: ``split`` is not understood.
    """
    reader = TokenReader(path)
    beside = None
    try:
        part = (
            document_range(reader, 0, reader.num_documents)
            if split is None
            else split_documents(reader, *split)
        )
        if labels is not None:
            beside = TokenReader(labels)
            _check_labels(reader, beside)
        return Source(reader=reader, documents=part, labels=beside)
    except BaseException:
        for opened in (reader, beside):
            if opened is not None:
                opened.close()
        raise


def _check_labels(tokens: TokenReader, labels: TokenReader, block: int = 1 << 20) -> None:
    """Refuse labels whose documents are not as long as those of the tokens, one by one."""
    if (tokens.num_documents, tokens.num_tokens) != (labels.num_documents, labels.num_tokens):
        raise DataError(
            f"{labels.prefix} holds {labels.num_documents} documents of {labels.num_tokens} "
            f"labels, {tokens.prefix} {tokens.num_documents} of {tokens.num_tokens} tokens; labels "
            "are written beside the tokens by tools/preprocess_data_with_mask.py"
        )
    if labels.dtype.kind != "i" or labels.dtype.itemsize < 4:
        raise DataError(
            f"{labels.prefix}: labels are {labels.dtype.name}, which does not hold both -100 (not "
            "trained on) and every token id; write them as int32"
        )
    for first in range(0, tokens.num_documents, block):
        last = min(first + block, tokens.num_documents)
        sizes = tokens.document_sizes(first, last)
        wrong = sizes != labels.document_sizes(first, last)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(
                f"{labels.prefix}: document {first + place} has "
                f"{labels.document_size(first + place)} labels, {tokens.prefix} has {sizes[place]} "
                "tokens there; both must be written from the same text"
            )
