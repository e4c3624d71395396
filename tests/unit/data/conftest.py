"""Small datasets on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.data.writer import TokenWriter

MakeDataset = Callable[..., str]


@pytest.fixture
def dataset(tmp_path: Path) -> MakeDataset:
    """Write documents of the given lengths; token t of the stream is (t + first) % modulo."""

    def make(
        name: str,
        lengths: Sequence[int],
        dtype: str = "uint16",
        first: int = 0,
        modulo: int = 60000,
    ) -> str:
        prefix = str(tmp_path / name)
        tokens = (np.arange(sum(lengths)) + first) % modulo
        with TokenWriter(prefix, dtype) as writer:
            writer.add_many(tokens, lengths)
        return prefix

    return make
