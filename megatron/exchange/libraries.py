"""The libraries that reading and writing Hugging Face folders takes, imported where used."""

from __future__ import annotations

from typing import Any

from megatron.errors import load_extra


def transformers(purpose: str) -> Any:
    """Return the module ``transformers``, quiet.

    Raises:
        MissingExtraError: it is not installed.
    """
    module = load_extra("transformers", "eval", purpose)
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module
