"""The libraries that reading and writing Hugging Face folders takes, imported where used."""

from __future__ import annotations

import importlib
from typing import Any

from megatron.errors import MissingExtraError


def transformers(purpose: str) -> Any:
    """Return the module ``transformers``, quiet.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        module = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", "eval", purpose) from None
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module
