"""Corpora to choose from, a selector that is easy to check, and the tool run in this process."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import run_command
from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write records as JSON lines, compressed if the name says so."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Return records whose text is as long as their number has digits in unary, and then some."""
    return [{"text": f"word{n} " * (n % 5 + 1)} for n in range(start, start + count)]


def chat(asked: str, said: str) -> dict[str, Any]:
    """Return a record that is a conversation of two turns."""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns}


@dataclass(kw_only=True)
class Lengths:
    """Scores a document by its text's length plus that of each target's first example.

    Attributes:
        prepared: how often it was prepared.
        fail_after: raise once so many batches are scored.
    """

    method: str = "lengths"
    aggregate: str = "max"
    needs_targets: bool = True
    scale: float = 1.0
    prepared: int = 0
    fail_after: int = 1 << 30
    batches: list[int] = field(default_factory=list)
    _targets: list[float] = field(default_factory=list)

    def parameters(self) -> Mapping[str, Any]:
        return {"scale": self.scale}

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        self.prepared += 1
        (folder / "size.txt").write_text(str(len(corpus)))
        return Cost(flops=1000.0, tokens=10)

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        assert int((folder / "size.txt").read_text()) > 0
        self._targets = [float(len(target.documents[0].text)) for target in targets] or [0.0]

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        if len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(len(documents))
        own = np.array([len(one.text) or np.nan for one in documents], dtype=np.float64)
        found = self.scale * own[:, None] + np.array(self._targets)[None, :]
        return found, Cost(flops=0.1 * len(documents), tokens=len(documents))


Tool = Callable[..., str]


def run_tool(capsys: Any) -> Tool:
    """Return a function that runs ``tools/select_data.py`` here and returns what it printed."""
    from tools import select_data

    def run(*words: object, code: int = 0) -> str:
        try:
            found = run_command(lambda: select_data.main([str(word) for word in words]))
        except SystemExit as error:  # argparse
            found = int(error.code or 0)
        shown = capsys.readouterr()
        assert found == code, shown.out + shown.err
        return str(shown.out + shown.err)

    return run
