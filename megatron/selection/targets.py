"""Target sets: what shall be learned, as named subtasks with examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.errors import DataError
from megatron.selection.base import Document, Target
from megatron.selection.inputs import Inputs, open_corpus
from megatron.tokenizer import Tokenizer

SUBTASK_KEYS: Final = ("subtask", "task")
_NAMED: Final = re.compile(r"(?P<name>[^=/\\*?]+)=(?P<path>.+)")


@dataclass(frozen=True, kw_only=True)
class TargetSet:
    """Targets, and what they are called together.

    Attributes:
        name: the task, as it stands in the names of outputs.
        targets: its subtasks, each with a name of its own.
    """

    name: str
    targets: tuple[Target, ...]

    def fingerprints(self) -> dict[str, str]:
        """Return a hash (hex) of each subtask's examples, in order."""
        return {target.name: _fingerprint(target.documents) for target in self.targets}


def open_targets(
    words: Sequence[str], *, field: str | None = None, tokenizer: Tokenizer | None = None
) -> TargetSet:
    """Read targets from files, or from tokenised data sets by their prefix.

    A word is ``NAME=PATH`` or a path: a folder is a task with a subtask for each of its files, a
    file one whose subtasks are in the key ``subtask`` or ``task`` of its records, or, where no
    record has one, a subtask of its own.  Where several words are given, the name of a word stands
    before those of its subtasks: ``mmlu/anatomy``.

    Args:
        words: as given, at least one.
        field: key that holds the text or the conversation; None finds out.
        tokenizer: that turns tokenised examples into text.

    Raises:
        DataError: something does not exist, has no text, or two subtasks have one name.
    """
    given = _Given(field=field, tokenizer=tokenizer, alone=len(words) == 1)
    found: dict[str, list[Document]] = {}
    groups = []
    for word in words:
        named = _NAMED.fullmatch(word) if not Path(word).exists() else None
        path = named["path"] if named else word
        own = named["name"].strip() if named else None
        groups.append(own or _task_name(path))
        for name, documents in _subtasks(path, own, given).items():
            if name in found:
                raise DataError(
                    f"--target {word}: a second subtask '{name}'; give one of them another name: "
                    "--target NAME=FILE"
                )
            found[name] = documents
    targets = tuple(Target(name=name, documents=tuple(all_)) for name, all_ in found.items())
    return TargetSet(name="+".join(dict.fromkeys(groups)), targets=targets)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What holds for every word.

    Attributes:
        field: see :func:`open_targets`.
        tokenizer: see there.
        alone: whether there is one word.
    """

    field: str | None
    tokenizer: Tokenizer | None
    alone: bool


def _subtasks(path: str, own: str | None, given: _Given) -> Mapping[str, list[Document]]:
    """Return the examples of a path by the name of their subtask."""
    inputs = Inputs(words=(path,), field=given.field, flag="--target")
    corpus = open_corpus(inputs, tokenizer=given.tokenizer)
    try:
        several = len(corpus.parts) > 1 or Path(path).is_dir()
        found: dict[str, list[Document]] = {}
        for row in corpus.rows():
            name = _inside(row.record) or (row.document.source if several else None)
            if name is None:
                name = own or row.document.source
            elif own is not None and not given.alone:
                name = f"{own}/{name}"
            found.setdefault(name, []).append(row.document)
        return found
    finally:
        corpus.close()


def _inside(record: Mapping[str, Any]) -> str | None:
    for key in SUBTASK_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def _task_name(path: str) -> str:
    name = Path(path).name
    return name.partition(".")[0] or name


def _fingerprint(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        parts = [document.text, *(turn.role for turn in document.turns)]
        for part in (*parts, *(turn.content for turn in document.turns)):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()
