"""From the configuration's three fields to a tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from megatron.errors import ConfigError, did_you_mean
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.huggingface import (
    from_pretrained_gpt2,
    from_tokenizer_json,
    from_vocab_and_merges,
)
from megatron.tokenizer.simple import ByteTokenizer, SentencePieceTokenizer, TiktokenTokenizer

_Builder = Callable[[str | None, str | None, bool], Tokenizer]

_BUILDERS: dict[str, _Builder] = {
    "HFTokenizer": lambda vocab, _, fast: from_tokenizer_json(vocab, "HFTokenizer", fast=fast),
    "GPT2BPETokenizer": lambda vocab, merges, fast: from_vocab_and_merges(
        vocab, merges, "GPT2BPETokenizer", fast=fast
    ),
    "HFGPT2Tokenizer": lambda vocab, _, fast: from_pretrained_gpt2(
        vocab, "HFGPT2Tokenizer", fast=fast
    ),
    "SPMTokenizer": lambda vocab, _, __: SentencePieceTokenizer(vocab, "SPMTokenizer"),
    "TiktokenTokenizer": lambda vocab, _, __: TiktokenTokenizer(vocab, "TiktokenTokenizer"),
    "CharLevelTokenizer": lambda _, __, ___: ByteTokenizer("CharLevelTokenizer"),
}

TOKENIZER_TYPES: tuple[str, ...] = tuple(_BUILDERS)


def build_tokenizer(
    tokenizer_type: str,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    *,
    fast: bool = True,
) -> Tokenizer:
    """Build a tokenizer by GPT-NeoX's names.

    Args:
        tokenizer_type: one of :data:`TOKENIZER_TYPES`, in any case.
        vocab_file: tokenizer.json (HFTokenizer), vocab.json (GPT2BPETokenizer), a folder or
            hub name (HFGPT2Tokenizer), a sentencepiece model (SPMTokenizer), a .tiktoken file
            or an encoding's name (TiktokenTokenizer); CharLevelTokenizer needs none.
        merge_file: merges.txt, of GPT2BPETokenizer only.
        fast: whether bulk encoding may take the fast path where it is verified.

    Raises:
        ConfigError: there is no such type.
        DataError: a file is missing or not what the type needs.
        MissingExtraError: the type's library is not installed.
    """
    by_lower = {name.lower(): builder for name, builder in _BUILDERS.items()}
    builder = by_lower.get(str(tokenizer_type).lower())
    if builder is None:
        raise ConfigError(
            f"unknown tokenizer_type '{tokenizer_type}'"
            f"{did_you_mean(str(tokenizer_type), TOKENIZER_TYPES)} "
            f"(available: {', '.join(TOKENIZER_TYPES)})"
        )
    return builder(vocab_file, merge_file, fast)
