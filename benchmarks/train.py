"""Time a training step against Hugging Face's GPT-NeoX on the same weights and data.

Ours is the engine of a run (DeepSpeed, ZeRO 1, per-domain losses observed), as a configuration
builds it; theirs a plain loop: SDPA, fused AdamW, in bf16 under autocast with weights in fp32, as
ours keeps master weights.  All run in this process, turn by turn, on the same batches, and their
losses have to agree.  A matrix product is timed in the same turns, so that a step can be stated
as a share of what the machine's GEMM gives.

    python benchmarks/train.py                      # CPU, fp32 and bf16, 27M parameters
    python benchmarks/train.py --profile            # where the time of our step goes
    python benchmarks/train.py --dtypes bf16 --layers 12 --hidden 768 --heads 12 \
        --sequence 2048 --batch 16 --vocabulary 50304      # with a GPU, that is where it runs
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import yaml

from benchmarks.support.measure import Times, compared, machine, race, rounded, shown, write
from benchmarks.support.peers import hugging_face, saved_bytes

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""How far losses of the same step may differ, relatively: fp32 by the order of additions; bf16 by
what is rounded where (autocast keeps norms and the residual stream of the embedding in fp32)."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCHES = 4
_LR = 3e-4


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    results = []
    for dtype in options.dtypes:
        results.append(_compare(dtype, options))
        content = {
            "benchmark": "train",
            "command": "python benchmarks/train.py",
            "machine": machine("torch", "transformers", "deepspeed"),
            "results": results,
        }
        if options.write and results[-1]:
            print(f"wrote {write('train', content)}", flush=True)


def _compare(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    from megatron.engine.runtime import start_runtime
    from megatron.model import flops_per_token, parameter_count

    runtime = start_runtime(deterministic=False)
    device = runtime.device
    config, engine = _engine(dtype, options)
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCHES, options.batch, options.sequence + 1)
    # A skewed distribution, so that there is something to learn.
    batches = (options.vocabulary * torch.rand(shape, generator=generator) ** 4).long().to(device)
    taken: dict[str, list[float]] = {}
    contestants = {"neomix": _ours(engine, batches, taken.setdefault("neomix", []))}
    peers = {"transformers": False, "transformers, compiled": True}
    models = {}
    for name, compiled in peers.items():
        if compiled and not options.compile:
            continue
        model = models[name] = hugging_face(config.model, engine.module).to(device)
        contestants[name] = _theirs(
            torch.compile(model) if compiled else model,
            batches,
            dtype,
            taken.setdefault(name, []),
        )
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=_DTYPES[dtype])
    contestants["gemm"] = lambda: left @ left
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if options.profile:
        _profile(contestants["neomix"], dtype, options)
        return {}
    times = race(contestants, turns=options.turns, warmup=options.warmup, wait=wait)
    tokens = options.batch * options.sequence
    rate = 2 * size**3 / statistics.median(times["gemm"].processor)
    result: dict[str, Any] = {
        "dtype": dtype,
        "device": device.type,
        "parameters": parameter_count(config.model),
        "shape": {
            name: getattr(options, name)
            for name in ("layers", "hidden", "heads", "vocabulary", "sequence", "batch")
        },
        "turns": options.turns,
        "gemm_gflops": rounded(rate / 1e9),
        "loss_tolerance": TOLERANCE[dtype],
        "contestants": {},
    }
    for name in taken:
        off = max(abs(a - b) / abs(b) for a, b in zip(taken[name], taken["neomix"], strict=True))
        result["contestants"][name] = {
            **_figures(times[name], times["neomix"], tokens, flops_per_token(config.model), rate),
            "losses": [rounded(taken[name][0]), rounded(taken[name][-1])],
            "losses_differ_by": rounded(off),
            "saved_bytes_per_token": rounded(
                _saved(name, engine, models, batches[0], dtype) / tokens
            ),
        }
        assert off <= TOLERANCE[dtype], f"{name}: losses differ by {off:.2g}"
    _print(result)
    engine._engine.destroy()
    torch._dynamo.reset()
    return result


def _figures(
    times: Times, ours: Times, tokens: int, per_token: float, gemm: float
) -> dict[str, Any]:
    seconds = statistics.median(times.processor)
    return {
        "tokens_per_second": rounded(tokens / seconds),
        "share_of_gemm": rounded(per_token * tokens / seconds / gemm),
        "time_over_ours": compared(times, ours),
    }


def _engine(dtype: str, options: argparse.Namespace) -> tuple[Any, Any]:
    from megatron.config import load_config, resolve_batch
    from megatron.parallel.layout import Layout
    from megatron.parallel.topology import Topology
    from megatron.signals.ledger import Ledger
    from megatron.signals.validation import LossObserver
    from megatron.training.engines import Batch, build_engine

    content = {
        "num_layers": options.layers,
        "hidden_size": options.hidden,
        "num_attention_heads": options.heads,
        "seq_length": options.sequence,
        "max_position_embeddings": options.sequence,
        "vocab_size": options.vocabulary,
        "rotary_pct": 0.25,
        "gpt_j_residual": True,
        "no_weight_tying": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "train_batch_size": options.batch,
        "train_micro_batch_size_per_gpu": options.batch,
        "train_iters": 1,
        "num_gpus": 1,
        "gradient_clipping": 0.0,
        "weight_decay": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": _LR, "betas": [0.9, 0.95], "eps": 1e-8}},
        "zero_optimization": {"stage": 1},
        "domains": {"one": {"train": "data/one"}},
        **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.yml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        config = load_config([str(file)])
    layout = Layout(world_size=1, tensor_size=1, pipe_size=1)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    observer = LossObserver(Ledger(1, device))
    batch = Batch(*resolve_batch(config.batch, 1))
    return config, build_engine(config, Topology.create(layout, 0), batch, observer)


def _labels(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows, length = batch.shape[0], batch.shape[1] - 1
    return (
        batch[:, 1:].contiguous(),
        torch.ones(rows, length, device=batch.device),
        torch.zeros(rows, dtype=torch.int64, device=batch.device),
        torch.full((rows,), 1 / (rows * length), device=batch.device),
    )


def _ours(engine: Any, batches: torch.Tensor, losses: list[float]) -> Callable[[], None]:
    pairs = [(batch[:, :-1].contiguous(), _labels(batch)) for batch in batches]
    ledger = engine.module.loss_fn.observe.ledger

    def step() -> None:
        number = len(losses)
        engine.train_step(number + 1, iter([pairs[number % _BATCHES]]), lr=_LR)
        losses.append(ledger.reduce().mean_loss)

    return step


def _theirs(
    model: Any, batches: torch.Tensor, dtype: str, losses: list[float]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    pairs = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches]

    def step() -> None:
        tokens, targets = pairs[len(losses) % _BATCHES]
        loss = _loss(model, tokens, targets, dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return step


def _loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor, dtype: str) -> torch.Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        logits = model(tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _saved(name: str, engine: Any, models: dict[str, Any], batch: torch.Tensor, dtype: str) -> int:
    """Return the bytes that a forward pass keeps for backward, weights left out."""
    tokens = batch[:, :-1].contiguous()
    if name == "neomix":
        return saved_bytes(engine.module, lambda: engine.module(tokens, _labels(batch)))
    model = models[name]
    run = torch.compile(model) if "compiled" in name else model
    targets = batch[:, 1:].contiguous()
    return saved_bytes(model, lambda: _loss(run, tokens, targets, dtype))


def _profile(step: Callable[[], None], dtype: str, options: argparse.Namespace) -> None:
    step(), step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{dtype}, three steps of ours")
    print(profiler.key_averages().table(sort_by=key, row_limit=options.rows))


def _print(result: dict[str, Any]) -> None:
    shape = result["shape"]
    print(
        f"\n{result['dtype']} on {result['device']}: {result['parameters'] / 1e6:.1f}M parameters, "
        f"{shape['layers']} × {shape['hidden']}, V={shape['vocabulary']}, {shape['batch']} × "
        f"{shape['sequence']} tokens; GEMM {result['gemm_gflops']:.0f} GFLOP/s"
    )
    for name, row in result["contestants"].items():
        print(
            f"{name:>24}: {row['tokens_per_second']:7.0f} tokens/s, {row['share_of_gemm']:4.0%} of "
            f"GEMM, time / ours {shown(row['time_over_ours']['processor'], 3)}, by the clock "
            f"{shown(row['time_over_ours']['wall'], 3)}; loss {row['losses'][0]:.5f} → "
            f"{row['losses'][1]:.5f} (off by {row['losses_differ_by']:.1e}); "
            f"{row['saved_bytes_per_token'] / 1e3:.0f} kB a token",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_DTYPES), default=list(_DTYPES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--profile", action="store_true", help="show where our time goes")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
