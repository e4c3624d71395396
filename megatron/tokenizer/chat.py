"""Tokenizers that know how a chat is written."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from megatron.errors import DataError, MissingExtraError


@lru_cache(maxsize=1)
def chat_tokenizer(path: str) -> Any:
    """Load a tokenizer that has a chat template.

    Raises:
        MissingExtraError: transformers is not there.
        DataError: there is no tokenizer, or it has no chat template.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError("transformers", "eval", "a chat template") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--tokenizer-path {path}: no Hugging Face tokenizer: {reason}") from None
    if tokenizer.chat_template is None:
        raise DataError(
            f"--tokenizer-path {path}: the tokenizer has no chat template; take one of a chat "
            "model, or add a chat_template.jinja to the folder"
        )
    return tokenizer
