#!/usr/bin/env python3
"""Train one rank of a run.

Usually started by ``./deepy.py train.py CONFIG…``, once per rank.  It also runs under any
launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun), and
by itself as a job of one rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.errors import NeomixError
from megatron.launch.command import RESOLVED_CONFIG_FLAG, decode_config
from megatron.launch.lock import RunLock
from megatron.launch.stop import StopFlag
from megatron.launch.wire import supervised

if TYPE_CHECKING:
    from megatron.config import Config


def main() -> None:
    """Run this rank and leave the process with its exit code."""
    arguments = _parse()
    with StopFlag() as stop:
        code, agreed = _guarded(arguments, stop)
        from megatron.engine.runtime import end_process

        end_process(code, collective=agreed)


def _guarded(arguments: argparse.Namespace, stop: StopFlag) -> tuple[int, bool]:
    """Return the exit code, and whether every rank has come to the end with it."""
    lock = None
    try:
        config = _load(arguments)
        if not supervised() and int(os.environ.get("RANK", "0")) == 0:
            lock = RunLock(config.run_dir).acquire()
        from megatron.engine.runtime import start_runtime
        from megatron.training.run import run
        from megatron.training.stall import collective_minutes

        runtime = start_runtime(
            deterministic=config.training.deterministic,
            timeout_minutes=collective_minutes(config.training.stall_timeout),
        )
        return run(config, runtime, stop), True
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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("conf_file", nargs="*", help="configuration files; .yml may be left out")
    parser.add_argument("-d", "--conf_dir", help="folder that relative names start from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )
    parser.add_argument(RESOLVED_CONFIG_FLAG, help="a whole configuration, packed by deepy.py")
    parser.add_argument("--local_rank", "--local-rank", help="ignored; LOCAL_RANK counts")
    return parser.parse_args()


def _load(arguments: argparse.Namespace) -> Config:
    import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
    from megatron.config import load_config

    packed = arguments.resolved_config
    if packed is None:
        return load_config(
            arguments.conf_file, conf_dir=arguments.conf_dir, overrides=arguments.set
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yml")
        file.write_text(decode_config(packed), encoding="utf-8")
        return load_config([str(file)])


if __name__ == "__main__":
    main()
