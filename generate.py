#!/usr/bin/env python3
"""Let a trained model write, one rank of it: without a prompt, from a file, or interactively.

Started by ``./deepy.py generate.py CONFIG…``, once per rank; also by any launcher that sets
RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

from typing import Any


def generate(*arguments: Any) -> int:
    """See :func:`megatron.training.generation.generate_run`."""
    from megatron.training.generation import generate_run

    return generate_run(*arguments)


if __name__ == "__main__":
    from megatron.training.program import run_program

    run_program("generate.py", __doc__, "generation", generate)
