"""Training a byte-level BPE."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DataError, MissingExtraError
from megatron.tokenizer.base import EOD_TOKEN

PADDING_TOKEN = "<|padding|>"
NORMALIZERS = ("none", "NFC", "NFD", "NFKC", "NFKD")


def train_byte_level_bpe(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int = 52000,
    normalizer: str = "none",
    add_prefix_space: bool = False,
    min_frequency: int = 2,
    special_tokens: Iterable[str] = (EOD_TOKEN, PADDING_TOKEN),
    progress: bool = False,
) -> int:
    """Train a byte-level BPE with GPT-2's splitting and write it as a tokenizer.json.

    All 256 bytes are in the vocabulary, so any text can be encoded.  The result depends only
    on the texts and the arguments.

    Args:
        texts: the training text; read once.
        output: path of the tokenizer.json, written atomically.
        vocab_size: at most this many ids, special tokens included.
        normalizer: Unicode normal form applied to text, or "none".
        add_prefix_space: put a space before a text that does not start with one.
        min_frequency: a pair seen less often is not merged.
        special_tokens: get the first ids.
        progress: show the library's progress bars.

    Returns:
        The size of the vocabulary, smaller than asked if the text gives no more merges.

    Raises:
        ConfigError: an argument is out of range.
        DataError: there is no text.
    """
    special = list(special_tokens)
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size is {vocab_size}; a byte-level vocabulary has at least {smallest} "
            "entries (256 bytes and the special tokens)"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    except ImportError:
        raise MissingExtraError("tokenizers", "train", "training a tokenizer") from None
    tokenizer = Tokenizer(models.BPE())
    if normalizer != "none":
        tokenizer.normalizer = _normalizer(normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.count:
        raise DataError("there is no text to train a tokenizer on")
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(temporary, path)
    return int(tokenizer.get_vocab_size())


class _Counted:
    """Counts what is taken from an iterable."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.count = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.count += 1
        return text


def _normalizer(name: str) -> Any:
    from tokenizers import normalizers

    if name not in NORMALIZERS:
        raise ConfigError(f"unknown normalizer '{name}' (available: {', '.join(NORMALIZERS)})")
    return getattr(normalizers, name)()
