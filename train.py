#!/usr/bin/env python3
"""Train one rank of a run.

Usually started by ``./deepy.py train.py CONFIG…``, once per rank.  It also runs under any
launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun), and
by itself as a job of one rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron.launch.stop import StopFlag


def main() -> NoReturn:
    """Run this rank and leave the process with its exit code."""
    from megatron.training.program import be_rank, rank_parser, read_config, sole_use

    arguments = rank_parser("train.py", __doc__).parse_args()

    def body(stop: StopFlag) -> int:
        config = read_config(arguments)
        with sole_use(config.run_dir):
            from megatron.engine.runtime import start_runtime
            from megatron.training.run import run
            from megatron.training.stall import collective_minutes

            runtime = start_runtime(
                deterministic=config.training.deterministic,
                timeout_minutes=collective_minutes(config.training.stall_timeout),
            )
            return run(config, runtime, stop)

    be_rank(body)


if __name__ == "__main__":
    main()
