"""From JSONL to token files, through the same pipeline as ``tools/preprocess_data.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.ingest.pipeline import PreprocessSettings, preprocess


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
    inputs: Sequence[Path],
    prefix: Path,
    choice: TokenizerChoice,
    *,
    workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Tokenise ``inputs`` into ``PREFIX_text_document.{bin,idx}``, each document ended by eod.

    Args:
        inputs: JSONL (plain, gz, zst), Parquet or text files, read in this order.
        prefix: path without ``_text_document``.
        choice: the tokenizer.
        workers: processes that tokenise.
        say: receives the pipeline's lines.

    Returns:
        Whether there was anything to do.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    settings = PreprocessSettings(
        inputs=tuple(str(path) for path in inputs),
        output_prefix=str(prefix),
        tokenizer_type=choice.kind,
        vocab_file=None if choice.vocab_file is None else str(choice.vocab_file),
        merge_file=None if choice.merge_file is None else str(choice.merge_file),
        append_eod=True,
        workers=workers,
    )
    return not preprocess(settings, say).already_done
