"""A small byte-level BPE, trained here once, and variants of it."""

from __future__ import annotations

import inspect
import json
import textwrap
import typing
from pathlib import Path

import pytest

from megatron.tokenizer.train import train_byte_level_bpe


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real code and prose of the standard library, and a little of the rest of Unicode."""
    sources = [inspect.getsource(module) for module in (textwrap, typing, inspect, json)]
    cut = [source[i : i + 3000] for source in sources for i in range(0, len(source), 3000)]
    other = "naïve café — Ελληνικά кириллица 漢字かな 한국어 १२३ ½ 👩‍👩‍👧 𝔘𝔫𝔦\u00a0\u2028\u3000x"
    return [*cut, other * 5, "", "  \n\n\t x  ", "It's <|endoftext|> and <|padding|>'s"]


@pytest.fixture(scope="session")
def tokenizer_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_byte_level_bpe(texts, path, vocab_size=2000)
    return path


@pytest.fixture
def variant(tokenizer_file: Path, tmp_path: Path) -> typing.Callable[..., Path]:
    """Return a function that writes the tokenizer with parts of its JSON changed."""

    def write(model: dict | None = None, added: list | None = None, **parts: object) -> Path:
        content = json.loads(tokenizer_file.read_text())
        content["model"].update(model or {})
        content["added_tokens"] += added or []
        content.update(parts)
        path = tmp_path / "variant.json"
        path.write_text(json.dumps(content))
        return path

    return write
