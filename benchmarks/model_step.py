"""Time a training step of our model against Hugging Face's GPT-NeoX: same shape, same weights.

Both run in this process, turn by turn, so that what else the machine does hits both alike; the
figure to read is the ratio.  A plain matrix product is timed in the same turns, so the step
can be stated as a share of what the machine's GEMM gives.

    python benchmarks/model_step.py                          # CPU, fp32
    python benchmarks/model_step.py --dtype bf16
    python benchmarks/model_step.py --device cuda --dtype bf16 --layers 12 --hidden 768 \
        --heads 12 --sequence 2048 --batch 16 --compile
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from megatron.config.model import ModelConfig
from megatron.model import GPT, DomainLoss, flops_per_token, parameter_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contestant:
    """Something that takes a training step and says what its loss was."""

    name: str
    step: Callable[[], torch.Tensor]
    seconds: list[float]
    losses: list[float]
    peak: int = 0


def main() -> None:
    """Run the comparison and print it."""
    options = _options()
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        seq_length=options.sequence,
        vocab_size=options.vocabulary,
        rotary_pct=0.25,
        gpt_j_residual=True,
        no_weight_tying=True,
    )
    batch = torch.randint(
        0, options.vocabulary, (options.batch, options.sequence + 1), device=options.device
    )
    ours = GPT(
        config,
        seed=0,
        loss_fn=DomainLoss(vocab_size=options.vocabulary, chunk_tokens=options.chunk_tokens),
    )
    theirs = _hugging_face(config, ours)
    contestants = [
        Contestant("neomix", _our_step(ours, batch, options), [], []),
        Contestant("transformers", _their_step(theirs, batch, options), [], []),
    ]
    if options.compile:
        compiled = torch.compile(_hugging_face(config, ours))
        contestants.append(
            Contestant("transformers, compiled", _their_step(compiled, batch, options), [], [])
        )
    gemm = _race(contestants, options)
    _report(contestants, gemm, config, options)
    _loss_alone(options)


def _our_step(model: GPT, batch: torch.Tensor, options: Any) -> Callable[[], torch.Tensor]:
    model.to(device=options.device, dtype=DTYPES[options.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows, length = batch.shape[0], batch.shape[1] - 1
    labels = (
        batch[:, 1:].contiguous(),
        torch.ones(rows, length, device=batch.device),
        torch.zeros(rows, dtype=torch.int64, device=batch.device),
        torch.full((rows,), 1 / (rows * length), device=batch.device),
    )
    tokens = batch[:, :-1].contiguous()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(tokens, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _their_step(model: Any, batch: torch.Tensor, options: Any) -> Callable[[], torch.Tensor]:
    model.to(device=options.device, dtype=DTYPES[options.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _hugging_face(config: ModelConfig, ours: GPT) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.padded_vocab_size(),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * config.hidden_size,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rotary_emb_base,
                "partial_rotary_factor": config.rotary_pct,
            },
            max_position_embeddings=config.seq_length,
            use_parallel_residual=config.gpt_j_residual,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )
    )
    last = config.num_layers
    pairs = {
        "gpt_neox.embed_in": "0.word_embeddings",
        "gpt_neox.final_layer_norm": f"{last + 1}.norm",
        **{f"gpt_neox.layers.{layer}": str(layer + 1) for layer in range(last)},
    }
    for there, here in pairs.items():
        model.get_submodule(there).load_state_dict(ours.get_submodule(here).state_dict())
    output = ours.get_submodule(f"{last + 2}.final_linear").state_dict()
    model.get_output_embeddings().load_state_dict(output)
    return model.train()


def _race(contestants: list[Contestant], options: Any) -> list[float]:
    """Let everyone take its steps, turn by turn; return the GEMM's FLOP/s of every turn."""
    gemm = []
    for turn in range(options.warmup + options.steps):
        for contestant in contestants:
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, loss = _timed(contestant.step, options.device)
            contestant.losses.append(float(loss))
            if turn >= options.warmup:
                contestant.seconds.append(seconds)
            if options.device == "cuda":
                contestant.peak = max(contestant.peak, torch.cuda.max_memory_allocated())
        gemm.append(_gemm(options))
    return gemm[options.warmup :]


def _timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    # One CPU thread's own time is not touched by what else the machine does.
    own = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own else time.perf_counter
    _wait(device)
    start = clock()
    result = function()
    _wait(device)
    return clock() - start, result


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _gemm(options: Any) -> float:
    size = 8192 if options.device == "cuda" else 1024
    left = torch.randn(size, size, device=options.device, dtype=DTYPES[options.dtype])
    seconds, _ = _timed(lambda: left @ left, options.device)
    seconds = min(seconds, _timed(lambda: left @ left, options.device)[0])
    return float(2 * size**3 / seconds)


def _report(
    contestants: list[Contestant], gemm: list[float], config: ModelConfig, options: Any
) -> None:
    tokens = options.batch * options.sequence
    per_token = flops_per_token(config)
    peak = statistics.median(gemm)
    print(
        f"{parameter_count(config) / 1e6:.1f}M parameters, {options.layers} layers × "
        f"{options.hidden}, V={config.padded_vocab_size()}, {options.batch} × "
        f"{options.sequence} tokens, {options.dtype} on {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.steps} turns"
    )
    print(f"GEMM in the same run: {peak / 1e9:.0f} GFLOP/s (median)")
    ours = contestants[0]
    for one in contestants:
        seconds = statistics.median(one.seconds)
        ratios = sorted(a / b for a, b in zip(one.seconds, ours.seconds, strict=True))
        memory = f", peak {one.peak / 2**30:.2f} GiB" if one.peak else ""
        print(
            f"{one.name:>24}: {tokens / seconds:8.0f} tokens/s, "
            f"{per_token * tokens / seconds / peak:4.0%} of GEMM, time / ours "
            f"{statistics.median(ratios):.3f} (middle half {ratios[len(ratios) // 4]:.3f} to "
            f"{ratios[-1 - len(ratios) // 4]:.3f}), loss {one.losses[0]:.6f} → "
            f"{one.losses[-1]:.6f}{memory}"
        )


def _loss_alone(options: Any) -> None:
    """Time output product and cross-entropy, forward and backward, against the plain ones."""
    dtype, device = DTYPES[options.dtype], options.device
    tokens = options.batch * options.sequence
    hidden = torch.randn(1, tokens, options.hidden, device=device, dtype=dtype)
    weight = torch.randn(options.vocabulary, options.hidden, device=device, dtype=dtype) * 0.02
    weight.requires_grad_()
    hidden.requires_grad_()
    targets = torch.randint(0, options.vocabulary, (1, tokens), device=device)
    labels = (
        targets,
        torch.ones(1, tokens, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.full((1,), 1 / tokens, device=device),
    )
    chunked = DomainLoss(vocab_size=options.vocabulary, chunk_tokens=options.chunk_tokens)

    def ours() -> None:
        hidden.grad = weight.grad = None
        chunked((hidden, weight), labels).backward()

    def plain() -> None:
        hidden.grad = weight.grad = None
        logits = (hidden @ weight.T).flatten(0, 1)
        F.cross_entropy(logits.float(), targets.flatten()).backward()

    ours(), plain()
    times = [
        (_timed(ours, device)[0], _timed(plain, device)[0]) for _ in range(max(3, options.steps))
    ]
    ratio = statistics.median(theirs / our for our, theirs in times)
    print(
        f"loss alone ({tokens} tokens × {options.vocabulary}): ours "
        f"{statistics.median(t[0] for t in times) * 1e3:.0f} ms, plain "
        f"{statistics.median(t[1] for t in times) * 1e3:.0f} ms, plain / ours {ratio:.3f}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="add a compiled peer")
    return parser.parse_args()


if __name__ == "__main__":
    main()
