r"""Choose documents before training: score them, then keep what a budget pays for.

    tools/select_data.py score  --method bm25 --train corpus.jsonl --target mmlu=mmlu.jsonl \
        --out scores.parquet
    tools/select_data.py select --scores scores.parquet --share 0.05 --out chosen

tools/select_data.py COMMAND --help has the flags of a command, and score --method METHOD --help
those of a method.  docs/selection.md describes all of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import did_you_mean, run_command

PROGRAM = "tools/select_data.py"
EXIT_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run the subcommand."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from megatron.selection.commands import COMMANDS, load_command

    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        hint = did_you_mean(name, COMMANDS)
        print(f"error: there is no command '{name}'{hint} (known: {known})", file=sys.stderr)
        return 2
    command = load_command(name)
    options = parse(name, rest)
    options.words = [PROGRAM, *given]
    options.exporter = _export
    # One process is one core; more are asked for by --workers or --shard.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return command.run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def parse(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a subcommand; a flag that there is not is told with the nearest."""
    from deepy import spread_set

    parser = command_parser(name, words)
    flags = parser._option_string_actions
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in flags:
            parser.error(f"unrecognized arguments: {word}{_hint(name, flag, list(flags))}")
    return parser.parse_args(spread_set(list(words)))


def _hint(command: str, flag: str, flags: Sequence[str]) -> str:
    """Say whose flag it is, or which flag was probably meant."""
    from megatron.selection.methods import METHODS

    if command == "score":
        owners = [
            method
            for method in METHODS
            if flag in command_parser(command, ["--method", method])._option_string_actions
        ]
        if owners:
            return f"; {flag} belongs to --method {' and '.join(owners)}"
    return did_you_mean(flag, flags)


def command_parser(name: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a subcommand followed by these words."""
    from megatron.selection.commands import load_command

    return load_command(name).make_parser(f"{PROGRAM} {name}", list(words))


def overview() -> str:
    """Return the help of the tool: what it is, and the help of every subcommand."""
    from megatron.selection.commands import COMMANDS

    parts = [str(__doc__).strip(), *(command_parser(name).format_help() for name in COMMANDS)]
    return "\n\n".join(parts).rstrip()


def _export(given: str, folder: Path, say: Callable[[str], None]) -> None:
    """Write RUN or RUN,ITERATION as a folder that transformers loads, unless it is there.

    What exports stands above what chooses, so the selectors that need it are handed it.
    """
    if folder.is_dir():
        return
    from megatron.exchange.export import ExportOptions, export
    from megatron.exchange.source import find_source
    from megatron.selection.language_model import named_model

    run = named_model(given)
    source = find_source(run.path, step=run.step, say=say)
    export(source, folder, ExportOptions(precision="fp32"), say=say)


def _terminate(*_: object) -> None:
    print("terminated; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(EXIT_TERMINATED)


if __name__ == "__main__":
    sys.exit(run_command(main))
