"""The documents of one tokenised data set, as tokens and as the text they stand for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.data.sources import Source, open_source
from megatron.errors import DataError
from megatron.selection.base import Document
from megatron.selection.part import Naming, PartIndex, Row
from megatron.tokenizer import Tokenizer, build_tokenizer

_BLOCK: Final = 1 << 12
# Text by bytes: nothing but its name is needed to read it back.
_WITHOUT_FILES: Final = "CharLevelTokenizer"


@dataclass(frozen=True, kw_only=True)
class TokenPart:
    """One prefix of ``.bin/.idx``, or the training part of it.

    Attributes:
        name: that its documents bear as their source.
        source: the files, opened, and the range of documents.
        tokenizer: that turns the tokens into text.
    """

    name: str
    source: Source
    tokenizer: Tokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens of all its documents."""
        return self.source.documents.stop - self.source.documents.start

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for an index to be this part's, JSON-able."""
        part, labels = self.source.documents, self.source.labels
        return {
            "name": self.name,
            "tokens": self.source.reader.fingerprint(),
            "labels": None if labels is None else labels.fingerprint(),
            "documents": [part.first, part.last],
            "tokenizer": self.tokenizer.sha256,
        }

    def build_index(self) -> PartIndex:
        """Return how many there are; the data set has an index of its own."""
        identity = self.identity()
        part = self.source.documents
        facts = "\x1f".join(str(value) for key, value in identity.items() if key != "name")
        return PartIndex(
            identity=identity,
            sha256=hashlib.sha256(facts.encode()).hexdigest(),
            documents=part.last - part.first,
        )

    def documents(
        self, index: PartIndex, naming: Naming, start: int, stop: int
    ) -> Iterator[Document]:
        """Yield documents [start, stop) of this part."""
        for row in self.rows(index, naming, start, stop):
            yield row.document

    def rows(self, index: PartIndex, naming: Naming, start: int, stop: int) -> Iterator[Row]:
        """Yield them with what an output of text has of them."""
        reader, labels = self.source.reader, self.source.labels
        sidecar = reader.sidecar
        made_by = None if sidecar is None else str(sidecar.tokenizer.get("sha256") or "") or None
        first = self.source.documents.first
        for low in range(first + start, first + stop, _BLOCK):
            high = min(low + _BLOCK, first + stop)
            sizes = reader.document_sizes(low, high)
            at = reader.document_start(low)
            for document, size in enumerate(sizes.tolist(), start=low):
                tokens = reader.read(at, at + size)
                number = document - first
                own = None if labels is None else labels.read(at, at + size).astype(np.int32)
                text = self.tokenizer.decode_text(tokens.tolist())
                found = Document(
                    id=naming.id_of(None, self.name, number),
                    source=self.name,
                    number=number,
                    text=text,
                    tokens=tokens,
                    tokenizer=made_by,
                    labels=own,
                )
                yield Row(document=found, record={"text": text})
                at += size

    def close(self) -> None:
        """Close the files."""
        self.source.close()


def is_prefix(path: str) -> bool:
    """Tell whether there is a tokenised data set of that name."""
    return os.path.exists(path + ".idx") and not os.path.isfile(path)


def open_token_part(
    name: str,
    prefix: str,
    tokenizer: Tokenizer | None,
    *,
    labels: str | None = None,
    split: tuple[str, str] | None = None,
) -> TokenPart:
    """Open a tokenised data set.

    Args:
        name: of its documents' source.
        prefix: path without ``.bin``/``.idx``.
        tokenizer: that the user named; None = the one that the sidecar names, if it has no files.
        labels: prefix of its labels.
        split: see ``open_source``.

    Raises:
        DataError: the files are unsound, or the tokenizer is missing or another.
    """
    source = open_source(prefix, labels, split)
    try:
        return TokenPart(name=name, source=source, tokenizer=_tokenizer_of(source, tokenizer))
    except BaseException:
        source.close()
        raise


def _tokenizer_of(source: Source, given: Tokenizer | None) -> Tokenizer:
    sidecar, prefix = source.reader.sidecar, source.reader.prefix
    made_by = dict(sidecar.tokenizer) if sidecar is not None else {}
    if given is None:
        if str(made_by.get("type")) == _WITHOUT_FILES:
            return build_tokenizer(_WITHOUT_FILES)
        what = f" (it was made by a {made_by['type']})" if made_by.get("type") else ""
        raise DataError(
            f"{prefix}: tokens, whose text is read by the tokenizer that made them{what}; give "
            "--tokenizer-type and --vocab-file, or a configuration with both (--config)"
        )
    if made_by.get("sha256") not in (None, given.sha256) and made_by.get("type") != "chat_template":
        raise DataError(
            f"{prefix}: tokenised by another tokenizer than the {given.name} that is given; give "
            "the one that made it with --tokenizer-type and --vocab-file"
        )
    return given
