"""The libraries of the extra ``select``, loaded where they are used."""

from __future__ import annotations

import importlib
from typing import Any, Final

from megatron.errors import MissingExtraError

_DISTRIBUTION: Final = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}


def load(module: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: its full name, "sklearn.decomposition".
        purpose: what needs it, the subject of the error's sentence.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        name = _DISTRIBUTION.get(library, library)
        raise MissingExtraError(name, "select", purpose) from error
