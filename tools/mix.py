"""Studies of many runs: ``tools/mix.py COMMAND CONFIG [CONFIG …] [-d DIR] [--set KEY=VALUE …]``.

A study is planned before any of its runs starts (--dry-run shows it).  Every run is an ordinary
one of deepy.py train.py, in a folder named by a hash of what decides its results: what is there
is not computed again, and what was killed goes on when the same command is given again.
docs/experiments.md describes the commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import did_you_mean, run_command

PROGRAM = "tools/mix.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the subcommand."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from deepy import spread_set
    from megatron.experiments.commands import COMMANDS, load_command

    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = did_you_mean(name, COMMANDS)
        print(f"error: there is no command '{name}'{hint} (known: {known})", file=sys.stderr)
        return 2
    options = command_parser(name).parse_intermixed_args(spread_set(rest))
    options.words = [PROGRAM, *given]
    return load_command(name).run(options)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand."""
    from megatron.experiments.commands import load_command

    command = load_command(name)
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def overview() -> str:
    """Return the help of the tool: what it is, and the help of every subcommand."""
    from megatron.experiments.commands import COMMANDS

    parts = [str(__doc__).strip(), *(command_parser(name).format_help() for name in COMMANDS)]
    return "\n\n".join(parts).rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main))
