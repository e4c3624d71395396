"""Measure the memory of small engines and compare it with what ``deepy.py --plan`` predicts.

Real engines (DeepSpeed, gloo) are built in fresh processes on the CPU.  Weights, gradients and
optimizer state are the bytes of the storages that hold them; activations those that one
micro-batch's forward pass saves for backward, each storage once.

    python benchmarks/memory.py                    # one case of each kind
    python benchmarks/memory.py --only ''          # every case
    python benchmarks/memory.py --only pipeline    # those whose name contains it
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(sys.path[0], "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.measure import machine, write

_BF16 = {"bf16": {"enabled": True}}
_RECOMPUTED = {"checkpoint_activations": True}
_SHAPE = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 8192}


_SHORT = (
    "fp32, ZeRO 1, data 1",
    "bf16, ZeRO 1, data 2",
    "bf16, ZeRO 2, data 2",
    "bf16, ZeRO 3, data 2, recomputed",
    "bf16, ZeRO 1, tensor 2, sequence",
    "bf16, ZeRO 1, pipeline 2",
    "bf16, ZeRO 1, grouped heads, swiglu",
)


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
    """Run the cases, print them and write them."""
    options = _options()
    from support.memory import compare
    from support.memory import write as write_config

    rows = []
    for name, (ranks, changes) in _cases().items():
        if not _wanted(name, options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = compare(write_config(Path(folder), **_SHAPE, **changes), ranks)
        for stage in sorted({row[0] for row in found}):
            held = {
                quantity: {"measured": measured, "predicted": predicted}
                for at, quantity, measured, predicted in found
                if at == stage
            }
            rows.append({"case": name, "stage": stage, "bytes": held})
            shown = ", ".join(
                f"{quantity} {one['measured'] / one['predicted']:.4f}"
                for quantity, one in held.items()
                if one["predicted"]
            )
            print(f"{name}, stage {stage}: measured / planned: {shown}", flush=True)
    content = {
        "benchmark": "memory",
        "command": "python benchmarks/memory.py",
        "machine": machine("torch", "deepspeed"),
        "settings": _SHAPE,
        "results": rows,
    }
    if options.write:
        print(f"wrote {write('memory', content)}")


def _wanted(name: str, only: list[str] | None) -> bool:
    return name in _SHORT if only is None else any(part in name for part in only)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--only", nargs="+", help="cases whose name contains one of these ('': all); default: a few"
    )
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
