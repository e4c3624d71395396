"""One rank's process, from its command line to its exit code; for every program of ranks."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron.config import Config, load_config
from megatron.errors import NeomixError
from megatron.launch.command import RESOLVED_CONFIG_FLAG, decode_config
from megatron.launch.lock import RunLock
from megatron.launch.stop import StopFlag
from megatron.launch.wire import supervised

_WAIT_MINUTES = 12 * 60  # while rank 0 downloads, tokenises or waits for a prompt

Work = Callable[..., int]


def run_program(name: str, description: str | None, folder: str, work: Work) -> None:
    """Run a program that looks at a model, and leave the process.

    Args:
        name: of the script.
        description: for its help.
        folder: of the run's folder, that it locks and that its logs are in.
        work: called with configuration, runtime, stop flag and a function that takes a line for
            the console; returns the exit code.
    """
    import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)

    arguments = _parser(name, description).parse_args()
    with StopFlag() as stop:
        code, agreed = _guarded(arguments, folder, work, stop)
        from megatron.engine.runtime import end_process

        end_process(code, collective=agreed)


def _guarded(
    arguments: argparse.Namespace, folder: str, work: Work, stop: StopFlag
) -> tuple[int, bool]:
    """Return the exit code, and whether every rank has come to the end with it."""
    lock = None
    try:
        config = _load(arguments)
        if not supervised() and int(os.environ.get("RANK", "0")) == 0:
            lock = RunLock(Path(config.run_dir) / folder).acquire()
        from megatron.engine.runtime import start_runtime

        runtime = start_runtime(
            deterministic=config.training.deterministic, timeout_minutes=_WAIT_MINUTES
        )

        def say(text: str) -> None:
            if runtime.rank == 0:
                print(text, flush=True)

        return work(config, runtime, stop, say), True
    except NeomixError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code, False
    except BaseException:
        # Written here, since the process ends without the interpreter's own farewell.
        traceback.print_exc()
        return 1, False
    finally:
        if lock is not None:
            lock.release()


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    parser.add_argument("conf_file", nargs="*", help="configuration files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", help="folder that relative names start from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )
    parser.add_argument(RESOLVED_CONFIG_FLAG, help="a whole configuration, packed by deepy.py")
    parser.add_argument("--local_rank", "--local-rank", help="ignored; LOCAL_RANK counts")
    return parser


def _load(arguments: argparse.Namespace) -> Config:
    packed = arguments.resolved_config
    if packed is None:
        return load_config(
            arguments.conf_file, conf_dir=arguments.conf_dir, overrides=arguments.set
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yml")
        file.write_text(decode_config(packed), encoding="utf-8")
        return load_config([str(file)])
