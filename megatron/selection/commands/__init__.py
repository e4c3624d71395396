"""The subcommands of ``tools/select_data.py``: one module each."""

from __future__ import annotations

import argparse
import importlib
from typing import Final, Protocol, cast


class Command(Protocol):
    """What the module of a subcommand offers; its docstring is the help."""

    def make_parser(self, prog: str, words: list[str]) -> argparse.ArgumentParser:
        """Return the parser of the words that follow the subcommand."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do what the command line asks for; return the exit code."""
        ...


COMMANDS: Final[tuple[str, ...]] = ("score", "merge", "select", "fit", "plan")
"""Names of the subcommands; the module has the same name."""


def load_command(name: str) -> Command:
    """Import the module of a subcommand."""
    return cast(Command, importlib.import_module(f"megatron.selection.commands.{name}"))
