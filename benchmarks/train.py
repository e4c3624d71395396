"""Time a training step against other libraries' on the same weights and data.

Ours is the engine of a run (DeepSpeed, ZeRO 1, per-domain losses observed), as a configuration
builds it, without and with torch_compile; theirs a plain loop: SDPA, fused AdamW, in bf16 under
autocast with weights in fp32, as ours keeps master weights.  All run in this process, turn by
turn, on the same batches, and their losses have to agree.  A matrix product is timed in the same
turns, by the faster library where there are two, so that a step can be stated as a share of what
the machine's GEMM gives.

    python benchmarks/train.py                      # CPU, fp32 and bf16, 27M parameters
    python benchmarks/train.py --batch 8 --accumulate 2          # a step as runs have them
    python benchmarks/train.py --profile            # where the time of our step goes
    python benchmarks/train.py --against nanogpt --nanogpt PATH  # a clone of nanoGPT
    python benchmarks/train.py --against megatron-core

With a GPU, that is where it runs.  160M and 1.4B parameters, as docs/performance.md asks for:

    python benchmarks/train.py --dtypes bf16 --layers 12 --hidden 768 --heads 12 \
        --sequence 2048 --batch 16 --vocabulary 50304 --turns 30 --largest-micro-batch
    python benchmarks/train.py --dtypes bf16 --layers 24 --hidden 2048 --heads 16 \
        --sequence 2048 --batch 8 --vocabulary 50304 --turns 20 --largest-micro-batch

All contestants are in memory at once: about 18 bytes a parameter each; --no-compile and --only
leave some out.

Results are kept in benchmarks/results/train.json by architecture, type, device and shape: a run
replaces those of its own shapes and leaves the others.
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if "--threads" in sys.argv[:-1]:  # before torch is imported
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import argparse
import dataclasses
import gc
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.largest import largest
from benchmarks.support.measure import (
    Times,
    compared,
    machine,
    race,
    rounded,
    shown,
    write_among,
)
from benchmarks.support.peers import Peer, hugging_face, megatron_core, nanogpt
from benchmarks.support.steps import DTYPES, Ours, Peaks, Shape, Theirs

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""How far losses of the same step may differ, relatively: fp32 by the order of additions; bf16 by
what is rounded where (autocast keeps norms and the residual stream of the embedding in fp32)."""
FAMILY = {"transformers": "GPT-NeoX", "nanogpt": "GPT-2", "megatron-core": "Megatron"}
"""The architecture that a peer has."""
OURS = "neomix"
_COMPILED = ", compiled"
_OUT_OF_MEMORY = 77  # exit status


def main() -> None:
    """Run the comparisons, print and write them."""
    options = _options()
    for peer in options.against:
        for dtype in options.dtypes:
            try:
                found = _compare(peer, dtype, options)
            except torch.OutOfMemoryError as error:
                print(
                    f"out of memory: {error}\nfewer rows (--batch), or --only one", file=sys.stderr
                )
                sys.exit(_OUT_OF_MEMORY)
            if not found:
                continue
            if options.largest_micro_batch:
                _add_largest(found, peer, dtype, options)
            _print(found)
            if options.write:
                path = write_among("train", "python benchmarks/train.py", found, _key)
                print(f"wrote {path}", flush=True)


def _compare(peer: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    from megatron.engine.runtime import start_runtime
    from megatron.model import flops_per_token, parameter_count
    from megatron.parallel import products

    device = start_runtime(deterministic=False).device
    shape = _shape(options)
    contestants = _contestants(peer, dtype, shape, device, options)
    model = contestants[OURS].config.model
    if options.only:
        for name in contestants.keys() - {options.only}:
            contestants.pop(name).close()
        gc.collect()
        if device.type == "cuda":  # its memory must not count
            torch.cuda.empty_cache()
    failed = _first_steps(contestants)
    if options.profile:
        for name, one in contestants.items():
            _profile(name, one.step, dtype, options)
        return {}
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    turns: dict[str, Callable[[], Any]] = {name: one.step for name, one in contestants.items()}
    turns["gemm"] = lambda: products.linear(left, left)
    peaks = Peaks(device)
    times = race(
        turns,
        turns=options.turns,
        warmup=options.warmup,
        around=peaks.around,
        wait=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
    )
    clock = device.type == "cuda"  # a device works while the processor waits
    gemm = 2 * size**3 / _seconds(times["gemm"], clock)
    first = next(iter(contestants))
    result = {
        "architecture": FAMILY[peer],
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if clock else "cpu",
        "parameters": parameter_count(model),
        "shape": dataclasses.asdict(shape),
        "turns": options.turns,
        "gemm_gflops": rounded(gemm / 1e9),
        "loss_tolerance": TOLERANCE[dtype],
        "machine": machine("torch", peer if peer != "nanogpt" else "torch", "deepspeed"),
        "failed": failed,
        "contestants": {
            name: {
                **_figures(times, name, (first, OURS + _COMPILED), shape.tokens, clock),
                "share_of_gemm": rounded(
                    flops_per_token(model) * shape.tokens / _seconds(times[name], clock) / gemm
                ),
                "losses": [rounded(one.losses[0]), rounded(one.losses[-1])],
                "losses_differ_by": rounded(_apart(one.losses, contestants[first].losses)),
                **_memory(one, peaks.bytes.get(name), shape),
            }
            for name, one in contestants.items()
        },
    }
    for one in contestants.values():
        one.close()
    torch._dynamo.reset()
    for name, row in result["contestants"].items():
        off = row["losses_differ_by"]
        assert off <= TOLERANCE[dtype], f"{name}: losses differ by {off:.2g}"
    return result


def _contestants(
    peer: str, dtype: str, shape: Shape, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Return ours and the peer, plain and compiled, by name."""
    found: dict[str, Any] = {OURS: Ours(shape, FAMILY[peer], dtype, device)}
    config, module = found[OURS].config.model, found[OURS].engine.module
    name = OURS + _COMPILED
    if options.compile and options.only in (None, name):
        found[name] = Ours(shape, FAMILY[peer], dtype, device, torch_compile=True)

    def theirs() -> Peer:
        if peer == "nanogpt":
            return nanogpt(options.nanogpt, config, module)
        if peer == "megatron-core":
            return megatron_core(config, module, device)
        return hugging_face(config, module)

    for compiled in (False, True) if options.compile else (False,):
        if compiled and peer == "megatron-core":  # its blocks are compiled by hand
            continue
        name = f"{peer}{_COMPILED if compiled else ''}"
        if options.only in (None, name):
            found[name] = Theirs(theirs(), shape, dtype, device, compiled=compiled)
    return found


def _first_steps(contestants: dict[str, Any]) -> dict[str, str]:
    """Let everyone train a step; take out, and return by name, whom the compiler fails."""
    failed: dict[str, str] = {}
    for name, one in list(contestants.items()):
        try:
            one.step()
        except Exception as error:
            if _COMPILED not in name or isinstance(error, torch.OutOfMemoryError):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del contestants[name]
            print(f"{name}: left out, torch.compile failed: {failed[name]}", flush=True)
    return failed


def _figures(
    times: Mapping[str, Times], name: str, ours: Sequence[str], tokens: int, clock: bool
) -> dict[str, Any]:
    """Return a contestant's rate, and its time over that of ours, plain and compiled."""
    plain, compiled = ours
    found = {
        "tokens_per_second": rounded(tokens / _seconds(times[name], clock)),
        "time_over_ours": compared(times[name], times[plain]),
    }
    if compiled in times:
        found["time_over_ours_compiled"] = compared(times[name], times[compiled])
    return found


def _memory(one: Any, peak: int | None, shape: Shape) -> dict[str, float]:
    tokens = shape.batch * shape.sequence
    if peak is not None:  # what a whole turn took, its gradients included
        return {"peak_bytes_per_token": rounded(peak / tokens)}
    return {"saved_bytes_per_token": rounded(one.saved() / tokens)}


def _seconds(times: Times, clock: bool) -> float:
    return statistics.median(times.wall if clock else times.processor)


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def _add_largest(
    result: dict[str, Any], peer: str, dtype: str, options: argparse.Namespace
) -> None:
    """Find each contestant's largest micro-batch, every size in a process of its own."""
    if result["device"] == "cpu":
        print("--largest-micro-batch: on a CPU memory has no such limit; left out")
        return
    torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--against", peer, "--dtypes", dtype]
    if options.nanogpt is not None:
        command += ["--nanogpt", str(options.nanogpt)]
    for field, value in result["shape"].items():
        if field not in ("batch", "accumulate"):
            command += [f"--{field}", str(value)]
    for name, row in result["contestants"].items():

        def fits(batch: int, name: str = name) -> bool:
            last = ["--only", name, "--batch", str(batch), "--turns", "1", "--warmup", "1"]
            done = subprocess.run(
                [*command, *last, "--no-write"], capture_output=True, text=True, check=False
            )
            if done.returncode not in (0, _OUT_OF_MEMORY):
                raise RuntimeError(f"{name}, {batch} rows: {done.stderr[-2000:]}")
            return done.returncode == 0

        row["largest_micro_batch"] = largest(fits, first=options.batch)


def _profile(name: str, step: Callable[[], None], dtype: str, options: argparse.Namespace) -> None:
    step(), step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{dtype}, three steps of {name}")
    print(profiler.key_averages().table(sort_by=key, row_limit=options.rows), flush=True)


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two results have to share for the later one to take the other's place."""
    threads = result["machine"]["threads"] if result["device"] == "cpu" else 0
    shape = tuple(result["shape"].values())
    return (result["architecture"], result["dtype"], result["device"], threads, *shape)


def _print(result: dict[str, Any]) -> None:
    shape = result["shape"]
    print(
        f"\n{result['architecture']}, {result['dtype']} on {result['device']}: "
        f"{result['parameters'] / 1e6:.1f}M parameters, "
        f"{shape['layers']} × {shape['hidden']}, V={shape['vocabulary']}, {shape['accumulate']} × "
        f"{shape['batch']} × {shape['sequence']} tokens; GEMM {result['gemm_gflops']:.0f} GFLOP/s"
    )
    for name, row in result["contestants"].items():
        kept = row.get("saved_bytes_per_token", row.get("peak_bytes_per_token", 0))
        most = row.get("largest_micro_batch")
        print(
            f"{name:>24}: {row['tokens_per_second']:7.0f} tokens/s, {row['share_of_gemm']:4.0%} of "
            f"GEMM, time / ours {shown(row['time_over_ours']['processor'], 3)}, by the clock "
            f"{shown(row['time_over_ours']['wall'], 3)}; loss {row['losses'][0]:.5f} → "
            f"{row['losses'][1]:.5f} (off by {row['losses_differ_by']:.1e}); "
            f"{kept / 1e3:.0f} kB a token{'' if most is None else f'; {most} rows at most'}",
            flush=True,
        )


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(**{one.name: getattr(options, one.name) for one in dataclasses.fields(Shape)})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--against", nargs="+", choices=tuple(FAMILY), default=["transformers"])
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a clone of nanoGPT")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--threads", type=int, default=1, help="of this process, on a CPU")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--warmup", type=int, default=1, help="turns after the first that do not count"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--only", help="time nobody else than this contestant")
    parser.add_argument(
        "--largest-micro-batch", action="store_true", help="find it for each (on a GPU)"
    )
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    options = parser.parse_args()
    if "nanogpt" in options.against and options.nanogpt is None:
        parser.error("--against nanogpt needs --nanogpt, a folder with nanoGPT's model.py")
    if options.vocabulary % 128:
        parser.error(
            f"--vocabulary is {options.vocabulary}; take a multiple of 128: rows of padding would "
            "count in the peers' softmax"
        )
    options.write = options.write and options.only is None  # there would be no ratio in it
    return options


if __name__ == "__main__":
    main()
