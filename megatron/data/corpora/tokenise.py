"""From JSONL to token files, through the same pipeline as ``tools/preprocess_data.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """Which tokenizer a corpus is made with.

    Attributes:
        kind: the value of ``tokenizer_type``.
        vocab_file: its vocabulary, ``tokenizer.json`` or model file.
        merge_file: the merges of a GPT-2 BPE.
    """

    kind: str
    vocab_file: Path | None = None
    merge_file: Path | None = None


def tokenise(
    inputs: Sequence[Path], prefix: Path, choice: TokenizerChoice, *, workers: int = 1
) -> None:
    """Tokenise ``inputs`` into ``PREFIX_text_document.{bin,idx}``; nothing to do if they stand.

    Args:
        inputs: JSONL (plain, gz, zst), Parquet or text files, read in this order.
        prefix: path without ``_text_document``.
        choice: the tokenizer.
        workers: processes that tokenise.
    """
    raise NotImplementedError
