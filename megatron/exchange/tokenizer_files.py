"""Tokenizer files of a Hugging Face folder from a run's tokenizer, and back."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from megatron.config import TokenizerConfig
from megatron.errors import DataError, NeomixError
from megatron.exchange.libraries import transformers
from megatron.tokenizer import Tokenizer, build_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Leading spaces,\ttabs\nand new lines\r\n\n",
    "def f(x: int) -> int:\n    return x ** 2  # 1234567890",
    "Größe, naïve, 数学, 🙂, עברית, \u00a0 and it's we'll",
    "a",
)


def open_tokenizer(settings: TokenizerConfig) -> Tokenizer | None:
    """Return a run's tokenizer; None where its configuration names none."""
    if settings.tokenizer_type is None:
        return None
    return build_tokenizer(
        settings.tokenizer_type, settings.vocab_file, settings.merge_file, fast=False
    )


def write_tokenizer(
    folder: Path, settings: TokenizerConfig, tokenizer: Tokenizer, *, pad: int | None, length: int
) -> None:
    """Write a tokenizer that ``AutoTokenizer`` loads, and check that it gives the same ids.

    Args:
        folder: the Hugging Face folder.
        settings: the run's.
        tokenizer: which they build.
        pad: id that fills up batches.
        length: longest sequence of the model.

    Raises:
        DataError: transformers' form of it gives other ids.
    """
    library = transformers("writing a tokenizer")
    if settings.tokenizer_type == "SPMTokenizer":
        theirs = _sentencepiece(library, folder, settings, tokenizer)
    else:
        theirs = _theirs(library, settings, tokenizer)
    theirs.model_max_length = length
    if pad is not None:
        theirs.pad_token = theirs.convert_ids_to_tokens(pad)
    theirs.save_pretrained(folder)
    check_tokenizer(folder, tokenizer)


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Check that a folder's tokenizer gives the ids of ours.

    Raises:
        DataError: it does not load, or gives others.
    """
    library = transformers("checking a tokenizer")
    remedy = "leave the tokenizer out with --no_save_tokenizer"
    try:
        loaded = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the library raises over its files
        raise DataError(
            f"AutoTokenizer does not load what was written: {error}; {remedy}"
        ) from error
    for text in _TEXTS:
        if (found := loaded(text)["input_ids"]) != (own := tokenizer.encode(text)):
            raise DataError(
                f"transformers' form of the tokenizer gives other ids than {tokenizer.name}: for "
                f"{text!r} {found[:8]} and {own[:8]}; {remedy}"
            )


def _theirs(library: Any, settings: TokenizerConfig, tokenizer: Tokenizer) -> Any:
    folder = Path(settings.vocab_file).parent if settings.vocab_file else None
    if (
        settings.tokenizer_type == "HFTokenizer"
        and folder is not None
        and Path(settings.vocab_file or "").name == "tokenizer.json"
        and (folder / "tokenizer_config.json").is_file()
    ):
        # It knows which tokens are special, and the chat template.
        return library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    special = {}
    if (eod := _eod_token(tokenizer)) is not None:
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), eod)
    backend = _backend(settings, tokenizer)
    return library.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def _eod_token(tokenizer: Tokenizer) -> str | None:
    from megatron.tokenizer.huggingface import HuggingFaceTokenizer

    try:
        eod = tokenizer.eod
    except NeomixError:
        return None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        token: str | None = tokenizer.library.id_to_token(eod)
        return token
    return tokenizer.decode([eod])


def _backend(settings: TokenizerConfig, tokenizer: Tokenizer) -> Any:
    """Return a ``tokenizers.Tokenizer`` that does what ours does."""
    from megatron.tokenizer.huggingface import HuggingFaceTokenizer

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.library
    if tokenizer.name == "CharLevelTokenizer":
        return _byte_backend()
    try:
        return _tiktoken_backend(tokenizer, settings)
    except Exception as error:
        raise DataError(
            f"{tokenizer.name} has no form that transformers loads ({error}); leave the tokenizer "
            "out with --no_save_tokenizer"
        ) from error


def _sentencepiece(
    library: Any, folder: Path, settings: TokenizerConfig, tokenizer: Tokenizer
) -> Any:
    """Return what a sentencepiece model does, as far as the fast library can do it.

    A space is put before every text, and spaces are letters, as Llama's model has it.
    """
    from tokenizers import normalizers

    model = folder / "tokenizer.model"
    shutil.copyfile(str(settings.vocab_file), model)
    content = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        backend = library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        ).backend_tokenizer
    except Exception as error:  # whatever the library raises over its files
        raise DataError(
            f"{settings.vocab_file} has no form that transformers loads ({error}); leave the "
            "tokenizer out with --no_save_tokenizer"
        ) from error
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None
    model.unlink()
    eod = backend.id_to_token(tokenizer.eod)
    return library.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, eos_token=eod, bos_token=eod
    )


def _tiktoken_backend(tokenizer: Tokenizer, settings: TokenizerConfig) -> Any:
    converters = importlib.import_module("transformers.convert_slow_tokenizer")
    encoding = tokenizer.encoding  # type: ignore[attr-defined]
    special = sorted(encoding._special_tokens, key=encoding._special_tokens.get)
    return converters.TikTokenConverter(
        vocab_file=settings.vocab_file,
        pattern=encoding._pat_str,
        extra_special_tokens=special,
    ).converted()


def _byte_characters() -> tuple[str, ...]:
    """Return the printable character that stands for each byte in byte-level vocabularies."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


_BYTES = _byte_characters()


def _byte_backend() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Byte 0 ends a document.  Under its own name, and not the printable one, it can be a special
    # token that nothing but that byte is taken for.
    vocabulary = {character: byte for byte, character in enumerate(("\0", *_BYTES[1:]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> dict[str, str]:
    """Copy a Hugging Face folder's tokenizer; return the keys that name it.

    Args:
        source: the Hugging Face folder.
        target: folder for its tokenizer's files.

    Returns:
        ``tokenizer_type``, ``vocab_file`` and, of a pair, ``merge_file`` (file names alone);
        empty where there is none that a run could use.
    """
    found = [name for name in _FILES if (source / name).is_file()]
    if not found:
        return {}
    target.mkdir()
    for name in found:
        shutil.copyfile(source / name, target / name)
    for kind, keys in (
        ("HFTokenizer", {"vocab_file": "tokenizer.json"}),
        ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
        ("SPMTokenizer", {"vocab_file": "tokenizer.model"}),
    ):
        if all(name in found for name in keys.values()):
            return {"tokenizer_type": kind, **keys}
    return {}
