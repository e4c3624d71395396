"""Numbers drawn evenly from [0, 1): the baseline that every method has to beat.

A document's number is a function of the seed and its id alone, so neither the order of the files
nor the number of shards changes it.  It reads no target and costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target

_BITS = 53  # of a float64's mantissa


@dataclass(frozen=True, kw_only=True)
class Random:
    """Scores that are even and independent.

    Attributes:
        seed: another one gives another order.
    """

    seed: int = 0
    method: ClassVar[str] = "random"
    aggregate: ClassVar[str] = "none"
    needs_targets: ClassVar[bool] = False

    def parameters(self) -> Mapping[str, Any]:
        """Return the seed."""
        return {"seed": self.seed}

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Do nothing."""
        return Cost()

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Do nothing."""

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Return [n, 1] numbers."""
        found = np.array([self._number(one.id) for one in documents], dtype=np.float64)
        return found.reshape(-1, 1), Cost()

    def _number(self, name: str) -> float:
        digest = hashlib.blake2b(f"{self.seed}\x1f{name}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> (64 - _BITS)) / (1 << _BITS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--seed", type=int, default=0, metavar="N",
        help="another seed gives another order (default: 0)")  # fmt: skip


def from_options(options: argparse.Namespace) -> Random:
    """Make the selector."""
    return Random(seed=options.seed)
