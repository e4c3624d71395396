"""A byte-level BPE for small corpora, trained on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.errors import MissingExtraError

END_OF_DOCUMENT = "<|endoftext|>"


def train(texts: Sequence[Path], target: Path, *, vocab_size: int, per_file_bytes: int) -> None:
    """Train a GPT-2 style byte-level BPE and write it as a ``tokenizer.json``, atomically.

    Args:
        texts: JSONL files with the key ``text``.
        target: the file to write.
        vocab_size: entries of the vocabulary, the end-of-document mark among them.
        per_file_bytes: at most so much of each file is read, so that every domain has the
            same say in the vocabulary.

    Raises:
        MissingExtraError: the library ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("tokenizers", "train", "training a tokenizer") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(texts, per_file_bytes), trainer)
    partial = target.with_name(target.name + ".tmp")
    tokenizer.save(str(partial))
    partial.replace(target)


def _texts(files: Sequence[Path], limit: int) -> Iterator[str]:
    for path in files:
        read = 0
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                text: str = json.loads(line)["text"]
                yield text
                read += len(text.encode())
                if read >= limit:
                    break
