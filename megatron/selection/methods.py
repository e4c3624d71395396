"""The selectors that a command line may name, each in a module of its own.

A selector's module is imported when it is asked for, and offers two functions beside its class:
``add_arguments`` adds the flags that it alone has, ``from_options`` makes the selector of what was
given.  A module's docstring is the help of its method; its first line stands in the overview.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol, cast

from megatron.errors import ConfigError, did_you_mean
from megatron.selection.base import Selector

METHODS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bm25": "megatron.selection.bm25",
        "embed": "megatron.selection.embed",
        "ppl": "megatron.selection.perplexity",
        "less": "megatron.selection.less",
        "random": "megatron.selection.random_order",
    }
)
"""Module of each method, by the value of ``--method``."""

_CHUNK_DOCUMENTS: Final = 4096
_OF_SLOW_METHODS: Final[Mapping[str, int]] = MappingProxyType(
    {"embed": 1024, "ppl": 128, "less": 64}
)


def chunk_documents(name: str) -> int:
    """Return how many documents of a method are one chunk, which is what a kill may lose."""
    return _OF_SLOW_METHODS.get(name, _CHUNK_DOCUMENTS)


class Method(Protocol):
    """What the module of a method offers; its docstring is the help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the method's own flags.

        They stand beside those of ``tools/select_data.py score`` (``--train``, ``--target``,
        ``--out``, ``--field``, ``--config``, ``--tokenizer-type``, ``--vocab-file``,
        ``--merge-file``, ``--tokenizer-path``, ``--shard``, ``--work-dir``, ``--chunk-documents``,
        ``--workers``, ``--overwrite``) and must have other names; two methods may share a name.
        """
        ...

    def from_options(self, options: argparse.Namespace) -> Selector:
        """Make the selector; called before any document is read.

        Raises:
            ConfigError: a value cannot be, naming the flag.
            MissingExtraError: a library is not installed.
        """
        ...


def load_method(name: str) -> Method:
    """Import the module of a method.

    Raises:
        ConfigError: there is no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(
            f"--method {name}: no such method{did_you_mean(name, METHODS)} "
            f"(known: {', '.join(METHODS)})"
        )
    return cast(Method, importlib.import_module(METHODS[name]))
