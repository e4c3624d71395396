"""From the words of a command line to a corpus: files, prefixes, domains of a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.data.ingest.sources import COMPRESSIONS, Source, find_sources
from megatron.errors import DataError, did_you_mean
from megatron.selection.base import Say
from megatron.selection.corpus import DocumentCorpus, distinct_names, index_parts
from megatron.selection.part import Part
from megatron.selection.text_part import open_text_part
from megatron.selection.token_part import is_prefix, open_token_part
from megatron.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron.config.data import DomainConfig


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a corpus is made of.

    Attributes:
        words: files, folders, globs, data sets, prefixes of tokens, or names of domains.
        field: key that holds the text or the conversation; None finds out.
        text_documents: "file" or "line": what a document is in plain text.
        domains: of a configuration, by name; None = there is none.
        split: of that configuration.
        flag: that named the words, for messages.
    """

    words: tuple[str, ...]
    field: str | None = None
    text_documents: str = "file"
    domains: Mapping[str, DomainConfig] | None = None
    split: str = ""
    flag: str = "--train"

    @property
    def known(self) -> Mapping[str, DomainConfig]:
        """The domains that may be named."""
        return self.domains or {}


def open_corpus(
    inputs: Inputs,
    *,
    tokenizer: Tokenizer | None = None,
    folder: Path | None = None,
    say: Say = lambda line: None,
) -> DocumentCorpus:
    """Open a corpus, and read it once if no index of it is in ``folder``.

    Args:
        inputs: what it is made of.
        tokenizer: that turns tokenised documents into text.
        folder: where indexes are kept; None keeps none.
        say: takes lines for the user.

    Raises:
        DataError: something does not exist, is damaged, or holds a record that cannot be used
            (naming file and line); or there is no document.
    """
    parts = _parts(inputs, tokenizer)
    try:
        corpus = index_parts(parts, folder, say)
        if not len(corpus):
            shown = ", ".join(inputs.words[:3])
            raise DataError(f"{inputs.flag} {shown}: no document; give an input that holds some")
    except BaseException:
        for part in parts:
            part.close()
        raise
    return corpus


def _parts(inputs: Inputs, tokenizer: Tokenizer | None) -> list[Part]:
    found: list[Source | _Tokens] = []
    for given in inputs.words:
        for word in _words(given, inputs):
            if is_prefix(word):
                found.append(_Tokens(path=word))
            elif word in inputs.known and not os.path.exists(word):
                found.extend(_domain(word, inputs))
            else:
                found.extend(_files(word, inputs))
    paths = [one.path for one in found]
    twice = [path for n, path in enumerate(paths) if _real(path) in map(_real, paths[:n])]
    if twice:
        raise DataError(f"{inputs.flag}: {twice[0]} is named twice; name it once")
    names = distinct_names(paths, _stem)
    parts: list[Part] = []
    try:
        for one, name in zip(found, names, strict=True):
            if isinstance(one, Source):
                parts.append(open_text_part(name, one, inputs.field))
            else:
                parts.append(
                    open_token_part(
                        one.name or name, one.path, tokenizer, labels=one.labels, split=one.split
                    )
                )
    except BaseException:
        for part in parts:
            part.close()
        raise
    return parts


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """A tokenised data set that was named."""

    path: str
    name: str | None = None
    labels: str | None = None
    split: tuple[str, str] | None = None


def _words(given: str, inputs: Inputs) -> list[str]:
    """Split a comma list, unless something is called so, comma and all."""
    if os.path.exists(given) or is_prefix(given) or given in inputs.known:
        return [given]
    return [part for part in (part.strip() for part in given.split(",")) if part]


def _files(word: str, inputs: Inputs) -> list[Source]:
    try:
        return find_sources([word], text_documents=inputs.text_documents, flag=inputs.flag)
    except DataError:
        hint = did_you_mean(word, inputs.known)
        if inputs.known and not os.path.exists(word) and "*" not in word:
            raise DataError(
                f"{inputs.flag} {word}: no such file, prefix of tokens or domain of the "
                f"configuration{hint} (its domains: {', '.join(inputs.known)})"
            ) from None
        raise


def _domain(name: str, inputs: Inputs) -> list[_Tokens]:
    domain = inputs.known[name]
    paths, labels = domain.prefixes("train"), domain.labels("train")
    split = (inputs.split, "train") if domain.uses_split else None
    own = [name] if len(paths) == 1 else [f"{name}/{part}" for part in distinct_names(paths, str)]
    return [
        _Tokens(path=path, name=own[n], labels=labels[n] if labels else None, split=split)
        for n, path in enumerate(paths)
    ]


def _stem(path: str) -> str:
    """Return a path without what tells its format."""
    name = Path(path)
    if name.suffix in COMPRESSIONS:
        name = name.with_suffix("")
    if name.suffix in (".jsonl", ".json", ".ndjson", ".txt", ".parquet"):
        name = name.with_suffix("")
    return str(name)


def _real(path: str) -> str:
    return os.path.realpath(path)
