"""Dropout among tensor ranks: what a rank draws, draws again and draws after a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron.model.attention import SelfAttention
from megatron.model.block import TransformerBlock
from megatron.model.dropout import Dropout
from megatron.parallel.rng import DropoutRng
from tests.support.layer_cases import BATCH, HIDDEN, LENGTH, LLAMA, NEOX, Bench

RATE = 0.4
DROPPING = {"hidden_dropout": RATE, "attention_dropout": RATE}


def dropout_facts(bench: Bench) -> dict[str, Any]:
    """Return what this rank drew, by name; the test compares ranks."""
    return {
        "hidden": _hidden(bench, step=0),
        "hidden, later": _hidden(bench, step=1),
        "attention": _attended(bench, step=0),
        "attention, later": _attended(bench, step=1),
        **{
            name: _block(bench, dataclasses.replace(spec, **DROPPING))
            for name, spec in (("neox", NEOX), ("llama", LLAMA))
        },
    }


def _rng(bench: Bench, step: int) -> DropoutRng:
    rng = DropoutRng(seed=5, topology=bench.topology)
    rng.begin(step=step, micro_batch=0)
    return rng


def _hidden(bench: Bench, *, step: int) -> torch.Tensor:
    """Return what is left of ones in the residual stream."""
    dropout = Dropout(rate=RATE, layer=0, place="mlp", rng=_rng(bench, step))
    left: torch.Tensor = dropout(
        bench.sequence(torch.ones(BATCH, LENGTH, HIDDEN, dtype=bench.dtype))
    )
    return left


def _attended(bench: Bench, *, step: int) -> torch.Tensor:
    """Return what the heads made of values that are all 1: the shares that were not dropped."""
    spec = dataclasses.replace(NEOX, **DROPPING)
    attention = SelfAttention(bench.scope(), spec, layer=0, rotary=None, dropout=_rng(bench, step))
    for parameter in attention.query_key_value.parameters():
        nn.init.constant_(parameter, 0.0)
    bias = attention.query_key_value.bias.data.view(attention.heads, 3, attention.head_size)
    bias[:, 2] = 1.0
    seen: list[torch.Tensor] = []
    attention.dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    attention(bench.sequence(bench.draw("x", BATCH, LENGTH, HIDDEN)))
    return seen[0]


def _block(bench: Bench, spec: Any) -> dict[str, list[torch.Tensor]]:
    """Return a block's output and gradients: kept, recomputed, and on another start."""

    def run(call: Callable[[DropoutRng, nn.Module, torch.Tensor], torch.Tensor], step: int) -> Any:
        rng = _rng(bench, step)
        block = TransformerBlock(bench.scope(), spec, layer=1, rotary=None, dropout=rng)
        x = bench.sequence(bench.draw("x", BATCH, LENGTH, HIDDEN)).clone().requires_grad_()
        out = call(rng, block, x)
        # Another micro-batch goes forward before this one comes back.
        rng.begin(step=step, micro_batch=1)
        with torch.no_grad():
            block(x)
        out.backward(bench.sequence(bench.draw("upstream", BATCH, LENGTH, HIDDEN)))
        return [out.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]

    def kept(_: DropoutRng, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block(x)
        return result

    def recomputed(rng: DropoutRng, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = rng.recomputed(block, x)
        return result

    return {
        "kept": run(kept, 3),
        "recomputed": run(recomputed, 3),
        "again": run(kept, 3),
        "later": run(kept, 4),
    }
