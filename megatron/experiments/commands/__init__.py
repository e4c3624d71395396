"""The subcommands of ``tools/mix.py``: one module each."""

from __future__ import annotations

import argparse
import importlib
from typing import Final, Protocol, cast


class Command(Protocol):
    """What the module of a subcommand offers; its docstring is the help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's flags."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Do what the command line asks for; return the exit code."""
        ...


COMMANDS: Final[tuple[str, ...]] = (
    "sweep",
    "fit-law",
    "regmix",
    "skillit-graph",
    "doremi",
    "budget",
    "compare",
    "fidelity",
    "report",
)
"""Names of the subcommands; the module has the name with ``_`` for ``-``."""


def load_command(name: str) -> Command:
    """Import the module of a subcommand."""
    module = importlib.import_module(f"megatron.experiments.commands.{name.replace('-', '_')}")
    return cast(Command, module)
