"""One rank's process, from its command line to its exit code; for every program of ranks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from megatron.config import Config, load_config
from megatron.errors import NeomixError
from megatron.launch.command import RESOLVED_CONFIG_FLAG, decode_config
from megatron.launch.lock import RunLock
from megatron.launch.stop import StopFlag
from megatron.launch.wire import supervised

_WAIT_MINUTES = 12 * 60  # while rank 0 downloads, tokenises or waits for a prompt

Work = Callable[..., int]


def run_program(name: str, description: str | None, folder: str, work: Work) -> NoReturn:
    """Run a program that looks at a model, and leave the process.

    Args:
        name: of the script.
        description: for its help.
        folder: of the run's folder, that it locks and that its logs are in.
        work: called with configuration, runtime, stop flag and a function that takes a line for
            the console; returns the exit code.
    """
    arguments = rank_parser(name, description).parse_args()

    def body(stop: StopFlag) -> int:
        config = read_config(arguments)
        with sole_use(Path(config.run_dir) / folder):
            from megatron.engine.runtime import start_runtime

            runtime = start_runtime(
                deterministic=config.training.deterministic, timeout_minutes=_WAIT_MINUTES
            )
            say = console(runtime.rank)
            return work(config, runtime, stop, say)

    be_rank(body)


def be_rank(body: Callable[[StopFlag], int]) -> NoReturn:
    """Run one rank's work and leave the process with its exit code.

    An error that a user can act on is said on standard error without a traceback.
    """
    with StopFlag() as stop:
        code, agreed = _guarded(body, stop)
        from megatron.engine.runtime import end_process

        end_process(code, collective=agreed)


def _guarded(body: Callable[[StopFlag], int], stop: StopFlag) -> tuple[int, bool]:
    """Return the exit code, and whether every rank has come to the end with it."""
    try:
        return body(stop), True
    except NeomixError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code, False
    except BaseException:
        # Written here, since the process ends without the interpreter's own farewell.
        traceback.print_exc()
        return 1, False


@contextlib.contextmanager
def sole_use(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder for a job that nobody else locks it for.

    Our launcher holds the lock for its ranks; under another launcher rank 0 takes it.

    Raises:
        RunError: another run holds it, or the folder cannot be written.
    """
    if supervised() or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    with RunLock(folder):
        yield


def console(rank: int) -> Callable[[str], None]:
    """Return the function that prints a line: on rank 0, and nowhere else."""

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    return say


def rank_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a program whose command line is a configuration and nothing else."""
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    parser.add_argument("conf_file", nargs="*", help="configuration files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", help="folder that relative names start from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )
    parser.add_argument(RESOLVED_CONFIG_FLAG, help="a whole configuration, packed by deepy.py")
    parser.add_argument("--local_rank", "--local-rank", help="ignored; LOCAL_RANK counts")
    return parser


def read_config(arguments: argparse.Namespace) -> Config:
    """Return the configuration that a command line names or carries.

    Args:
        arguments: with ``resolved_config`` (packed by a launcher, or None), ``conf_file``,
            ``conf_dir`` and ``set``.

    Raises:
        ConfigError: it is refused.
    """
    import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)

    packed = arguments.resolved_config
    if packed is None:
        return load_config(
            arguments.conf_file, conf_dir=arguments.conf_dir, overrides=arguments.set
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yml")
        file.write_text(decode_config(packed), encoding="utf-8")
        return load_config([str(file)])
