#!/usr/bin/env python3
"""Measure a run's checkpoint by lm-eval's tasks, one rank of it.

Started by ``./deepy.py evaluate.py CONFIG… --eval_tasks TASK…``, once per rank; also by any
launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

from typing import Any


def evaluate(*arguments: Any) -> int:
    """See :func:`megatron.training.evaluation.evaluate_run`."""
    from megatron.training.evaluation import evaluate_run

    return evaluate_run(*arguments)


if __name__ == "__main__":
    from megatron.training.program import run_program

    run_program("evaluate.py", __doc__, "evaluation", evaluate)
