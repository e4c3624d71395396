"""Time a linear layer's three matrix products in fp32 against torch's own.

Forward, the gradient by the input and the gradient by the weight (megatron/parallel/products.py),
at the shapes of a model of 27M parameters and of one of 160M.  All run in this process, turn by
turn, on the same numbers, and results have to agree.  On processors where the products are left
to torch the two are the same code, and the ratio is 1.

    python benchmarks/products.py
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.support.measure import compared, machine, race, rounded, shown, write

TOLERANCE = 1e-5
"""How far results may differ, relatively to the largest number: by the order of additions."""


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    content: dict[str, Any] = {
        "benchmark": "products",
        "command": "python benchmarks/products.py",
        "machine": machine("torch"),
        "tokens": options.tokens,
        "turns": options.turns,
        "results": [],
    }
    for hidden in options.hidden:
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            content["results"] += _compare(hidden * inputs, hidden * outputs, options)
    content["results"] += _compare(options.hidden[0], options.vocabulary, options)
    if options.write:
        print(f"wrote {write('products', content)}", flush=True)


def _compare(inputs: int, outputs: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron.parallel import products

    generator = torch.Generator().manual_seed(0)
    sizes = ((options.tokens, inputs), (outputs, inputs), (options.tokens, outputs))
    x, weight, gradient = (torch.randn(size, generator=generator) for size in sizes)
    pairs: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]] = {
        "forward": (lambda: products.linear(x, weight), lambda: F.linear(x, weight)),
        "by the input": (
            lambda: products.input_gradient(gradient, weight),
            lambda: gradient @ weight,
        ),
        "by the weight": (
            lambda: products.weight_gradient(gradient, x),
            lambda: gradient.t() @ x,
        ),
    }
    found = []
    for what, (ours, theirs) in pairs.items():
        expected = theirs()
        apart = float((ours() - expected).abs().max() / expected.abs().max())
        assert apart <= TOLERANCE, f"{what}, {inputs} → {outputs}: differs by {apart:.2g}"
        times = race({"neomix": ours, "torch": theirs}, turns=options.turns)
        work = 2 * options.tokens * inputs * outputs
        result = {
            "inputs": inputs,
            "outputs": outputs,
            "what": what,
            "gflops": {
                name: rounded(work / statistics.median(one.processor) / 1e9)
                for name, one in times.items()
            },
            "time_over_ours": compared(times["torch"], times["neomix"]),
            "differs_by": rounded(apart),
        }
        print(
            f"{inputs:5} → {outputs:5} {what:14}: {result['gflops']['neomix']:6.1f} GFLOP/s, torch "
            f"{result['gflops']['torch']:6.1f}, time / ours "
            f"{shown(result['time_over_ours']['processor'])}, off by {apart:.1e}",
            flush=True,
        )
        found.append(result)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
