"""A tokenizer, a small corpus, and ways to run the tools."""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from ingest_files import write_jsonl

from megatron.errors import run_command
from megatron.tokenizer.train import train_byte_level_bpe

ROOT = Path(__file__).resolve().parents[3]


def documents() -> list[str]:
    source = inspect.getsource(textwrap) + inspect.getsource(json)
    cut = [source[i : i + 400] for i in range(0, len(source), 400)]
    return [*cut, "naïve 漢字 👩‍👧", " ", "\n", "It's <|endoftext|> here", "x" * 5000]


@pytest.fixture(scope="session")
def docs() -> list[str]:
    return documents()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_byte_level_bpe(documents(), path, vocab_size=700)
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path, docs: list[str]) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"text": doc} for doc in docs])


@pytest.fixture
def preprocess(tokenizer_file: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs preprocess_data.py in this process and gives its output."""
    from tools import preprocess_data

    def run(*arguments: object, code: int = 0, tokenizer: bool = True) -> str:
        given = [str(a) for a in arguments]
        if tokenizer:
            given += ["--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer_file]
        found = run_command(lambda: preprocess_data.main(given))
        out, err = capsys.readouterr()
        assert found == code, out + err
        assert "Traceback" not in err
        return out + err

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
