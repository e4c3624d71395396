"""Errors that a user can act on, and how a command ends with one.

Everything a user can cause (a misspelt key, a truncated file, a full disk) is
raised as a :class:`NeomixError`.  Its message names the field or file, the value
found and the remedy; commands print it as one message and exit with code 2.
Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

EXIT_BAD_INPUT = 2


class NeomixError(Exception):
    """A problem with the user's input or machine that the user can fix."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(NeomixError):
    """A configuration key or value is wrong."""


class DataError(NeomixError):
    """A data file is missing, damaged, foreign or too small."""


class CheckpointError(NeomixError):
    """A checkpoint is missing, damaged, or does not fit the run."""


class RunError(NeomixError):
    """A run cannot start or go on (folder in use, disk full, ranks disagree)."""


class MissingExtraError(NeomixError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        """Name the library, the extra that brings it, and what needs it."""
        super().__init__(
            f"{purpose} needs the library '{library}', which is not installed; "
            f"install it with: pip install 'neomix[{extra}]'"
        )


_DISTRIBUTION: Final = {"sklearn": "scikit-learn", "sentence_transformers": "sentence-transformers"}


def load_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: its full name, "sklearn.decomposition".
        extra: what of ours brings it.
        purpose: what needs it, the subject of the error's sentence.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingExtraError(_DISTRIBUTION.get(library, library), extra, purpose) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's ``main`` and return its exit code, turning user errors into one message.

    Returns:
        ``main``'s own code (``None`` counts as 0), the error's code after a
        :class:`NeomixError`, 130 after Ctrl-C, or 141 when nobody reads
        the output any more.
    """
    try:
        return main() or 0
    except NeomixError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `… | head` does.  What is still in the buffer
        # goes nowhere, or the interpreter would complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
