"""Measure the memory of small engines and compare it with what ``deepy.py --plan`` predicts.

Real engines (DeepSpeed, gloo) are built in fresh processes on the CPU.  Weights, gradients and
optimizer state are the bytes of the storages that hold them; activations those that one
micro-batch's forward pass saves for backward, each storage once.

    python benchmarks/memory.py                    # every case
    python benchmarks/memory.py --only pipeline    # those whose name contains it
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(sys.path[0], "tests"))

import argparse
import tempfile
from pathlib import Path
from typing import Any

_BF16 = {"bf16": {"enabled": True}}
_RECOMPUTED = {"checkpoint_activations": True}
_SHAPE = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8192}


def _cases() -> dict[str, tuple[int, dict[str, Any]]]:
    """Return ranks and settings of every case, by name."""
    cases: dict[str, tuple[int, dict[str, Any]]] = {}
    for stage in (1, 2, 3):
        zero = {"zero_optimization": {"stage": stage}}
        for data in (1, 2):
            cases[f"fp32, ZeRO {stage}, data {data}"] = data, zero
            cases[f"bf16, ZeRO {stage}, data {data}"] = data, _BF16 | zero
        cases[f"bf16, ZeRO {stage}, data 2, recomputed"] = 2, _BF16 | zero | _RECOMPUTED
    tensor, pipeline = {"model_parallel_size": 2}, {"pipe_parallel_size": 2}
    cases["bf16, ZeRO 1, tensor 2"] = 2, _BF16 | tensor
    cases["bf16, ZeRO 1, tensor 2, sequence"] = 2, _BF16 | tensor | {"sequence_parallel": True}
    cases["bf16, ZeRO 1, pipeline 2"] = 2, _BF16 | pipeline
    cases["bf16, ZeRO 1, pipeline 2, tensor 2"] = 4, _BF16 | pipeline | tensor
    cases["bf16, ZeRO 1, grouped heads, swiglu"] = (
        1,
        _BF16
        | {
            "num_kv_heads": 2,
            "activation": "swiglu",
        },
    )
    return cases


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    from support.memory import compare, write

    print("MiB measured (measured ÷ predicted); the rank of a stage that holds most\n")
    names = ("weights", "gradients", "master", "moments", "bucket", "activations", "in_flight")
    print(f"| case | stage | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|", flush=True)
    for name, (ranks, changes) in _cases().items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(write(Path(folder), **_SHAPE, **changes), ranks)
        for stage in sorted({row[0] for row in rows}):
            cells = [_cell(*row[1:]) for row in rows if row[0] == stage]
            print(f"| {name} | {stage} | {' | '.join(cells)} |", flush=True)


def _cell(quantity: str, measured: float, predicted: float) -> str:
    if quantity == "in_flight":
        return f"{measured:.0f} ({predicted:.0f})"
    return f"{measured / 2**20:.2f} ({measured / predicted:.4f})"


if __name__ == "__main__":
    main()
