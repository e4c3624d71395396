from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import megatron.mixing  # noqa: F401  (registers the methods)
from megatron.config import Config, load_config

BASE = """\
num_layers: 2
hidden_size: 64
num_attention_heads: 4
seq_length: 128
train_micro_batch_size_per_gpu: 4
train_iters: 100
optimizer: {type: AdamW, params: {lr: 1e-3}}
domains:
  code: {train: data/code, weight: 1}
  prose: {train: [data/a, data/b], weight: 3}
"""


class Files:
    """Writes files into a folder and loads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str, name: str = "a.yml") -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def load(self, *texts: str, overrides: Sequence[str] = ()) -> Config:
        names = [self.write(text, f"{'abcdef'[i]}.yml") for i, text in enumerate(texts)]
        return load_config(names, overrides=overrides)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def load(files: Files) -> Callable[..., Config]:
    """Load the base configuration with further text and overrides."""

    def loader(text: str = "", *overrides: str, without: Sequence[str] = ()) -> Config:
        lines = BASE.splitlines(keepends=True)
        base = "".join(line for line in lines if line.split(":")[0] not in without)
        if "domains" in without:
            base = base[: base.index("  code")]
        return files.load(base + text, overrides=overrides)

    return loader
