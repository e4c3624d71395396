"""Time the output projection and its cross-entropy, forward and backward, against torch's own.

Ours gives a weighted sum and every token's loss, in chunks of tokens, with the gradient taken on
the spot (megatron/parallel/cross_entropy.py).  Against it: ``linear_cross_entropy`` of torch 2.13
in chunks, asked for the mean, and for every token's loss as ours gives them; the plain product
with ``cross_entropy``, which holds all logits; and that compiled.  All run in this process, turn
by turn, on the same numbers, and losses and gradients have to agree.

    python benchmarks/output_loss.py
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

OURS = "neomix"
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far gradients may differ, relatively to the largest: in bf16 by what is rounded where."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ALLOCATION = "[memory]"

Step = Callable[[], torch.Tensor]


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    results = []
    for dtype in options.dtypes:
        for vocabulary in options.vocabulary:
            results.append(_compare(dtype, vocabulary, options))
            content = {
                "benchmark": "output_loss",
                "command": "python benchmarks/output_loss.py",
                "machine": machine("torch"),
                "results": results,
            }
            if options.write:
                print(f"wrote {write('output_loss', content)}", flush=True)


def _compare(dtype: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, options.hidden, generator=generator)
        .mul_(scale)
        .to(device, _DTYPES[dtype])
        .requires_grad_()
        for rows, scale in ((options.tokens, 1.0), (vocabulary, 0.02))
    )
    targets = torch.randint(0, vocabulary, (options.tokens,), generator=generator).to(device)
    steps = {
        name: _step(loss, hidden, weight)
        for name, loss in _losses(hidden, weight, targets, vocabulary).items()
    }
    # Ours keeps room for a chunk's logits, which counts.
    fresh = _step(_losses(hidden, weight, targets, vocabulary)[OURS], hidden, weight)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = {name: _outcome(step, hidden, weight) for name, step in steps.items()}
    times = race(steps, turns=options.turns, wait=wait)
    result: dict[str, Any] = {
        "dtype": dtype,
        "device": device.type,
        "tokens": options.tokens,
        "hidden": options.hidden,
        "vocabulary": vocabulary,
        "turns": options.turns,
        "contestants": {},
    }
    for name, step in steps.items():
        apart = max(_apart(one, ours) for one, ours in zip(found[name], found[OURS], strict=True))
        assert apart <= TOLERANCE[dtype], f"{name}: differs by {apart:.2g}"
        result["contestants"][name] = {
            "milliseconds": rounded(1e3 * statistics.median(times[name].processor)),
            "time_over_ours": compared(times[name], times[OURS]),
            "peak_bytes": _peak(fresh if name == OURS else step, hidden, weight),
            "differs_by": rounded(apart),
        }
    _print(result)
    torch._dynamo.reset()
    return result


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> dict[str, Step]:
    """Return the contestants: each returns the mean of the tokens' losses."""
    from megatron.parallel.cross_entropy import weighted_cross_entropy
    from megatron.parallel.scratch import Scratch
    from megatron.parallel.topology import Topology

    scratch = Scratch()
    weights = torch.full(targets.shape, 1.0 / len(targets), device=targets.device)

    def ours() -> torch.Tensor:
        return weighted_cross_entropy(
            hidden,
            weight,
            targets,
            weights,
            vocab_size=vocabulary,
            topology=Topology.single(),
            chunk_tokens=1024,
            scratch=scratch,
        )[0]

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    compiled = torch.compile(plain)
    contestants: dict[str, Step] = {
        OURS: ours,
        "linear and cross_entropy": lambda: plain(hidden, weight),
        "linear and cross_entropy, compiled": lambda: compiled(hidden, weight),
    }
    theirs: Any = getattr(F, "linear_cross_entropy", None)
    if theirs is not None:
        chunked = torch.nn.LinearCrossEntropyOptions()
        contestants["linear_cross_entropy"] = lambda: theirs(
            hidden, weight, targets, options=chunked
        )
        # What we need of it: every token's loss, which weights and domains are applied to.
        contestants["linear_cross_entropy, a loss for every token"] = lambda: torch.dot(
            theirs(hidden, weight, targets, reduction="none", options=chunked).float(), weights
        )
    return contestants


def _step(loss: Step, hidden: torch.Tensor, weight: torch.Tensor) -> Step:
    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return step


def _outcome(step: Step, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    value = step()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [value.float(), hidden.grad.float().clone(), weight.grad.float().clone()]


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _peak(step: Step, hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the most bytes that a step holds at once beside its inputs; gradients count."""
    hidden.grad = weight.grad = None
    if hidden.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    untyped: Any = profiler.profiler
    held = most = 0
    for event in untyped.kineto_results.events():
        if event.name() == _ALLOCATION:
            held += event.nbytes()
            most = max(most, held)
    return most


def _print(result: dict[str, Any]) -> None:
    print(
        f"\n{result['dtype']} on {result['device']}: {result['tokens']} tokens × "
        f"{result['hidden']}, V={result['vocabulary']:,}"
    )
    for name, row in result["contestants"].items():
        print(
            f"{name:>46}: {row['milliseconds']:7.1f} ms, time / ours "
            f"{shown(row['time_over_ours']['processor'])}, {row['peak_bytes'] / 2**20:6.1f} MiB, "
            f"off by {row['differs_by']:.1e}",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_DTYPES), default=list(_DTYPES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
