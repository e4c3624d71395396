"""Optimizers against plain loops over numbers, torch's own forms, and their flat pieces."""

from __future__ import annotations

import builtins
import math
import sys
import types
from typing import Any

import pytest
import torch

from megatron.config.optimizers import KINDS
from megatron.engine.fragments import FlatPart, Fragment
from megatron.engine.optimizer import build_optimizer
from megatron.engine.sm3 import SM3, cover_of
from megatron.errors import ConfigError

SHAPES = ((5, 3), (4,), (2, 6))


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(kind: str, steps: int = 6, **params: Any) -> list[torch.Tensor]:
    held = parameters()
    decay = params.pop("weight_decay", 0.0)
    optimizer = build_optimizer(
        [{"params": held, "weight_decay": decay}], kind=kind, lr=0.05, **params
    )
    for step in range(steps):
        for parameter, gradient in zip(held, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in held]


def close(one: list[torch.Tensor], other: list[torch.Tensor], bound: float = 1e-6) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def each_number(update: Any, steps: int = 6) -> list[torch.Tensor]:
    """Apply ``update(state, weight, gradient, step) -> weight`` to every number by itself."""
    result = []
    for place, start in enumerate(parameters()):
        flat = start.detach().double().reshape(-1).tolist()
        states: list[dict[str, float]] = [{} for _ in flat]
        for step in range(steps):
            gradient = gradients(step)[place].double().reshape(-1).tolist()
            flat = [
                update(state, weight, slope, step)
                for state, weight, slope in zip(states, flat, gradient, strict=True)
            ]
        result.append(torch.tensor(flat).view(start.shape))
    return result


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_is_the_papers(decay: float) -> None:
    def update(state: dict[str, float], w: float, g: float, step: int) -> float:
        m = state.get("m", 0.0)
        direction = math.copysign(1.0, 0.9 * m + 0.1 * g)
        state["m"] = 0.98 * m + 0.02 * g
        return w - 0.05 * (direction + decay * w)

    close(trained("lion", betas=(0.9, 0.98), weight_decay=decay), each_number(update))


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.0), (0.5, 0.1)])
def test_madgrad_is_the_papers(momentum: float, decay: float) -> None:
    def update(state: dict[str, float], w: float, g: float, step: int) -> float:
        rate = 0.05 + 1e-6
        start = state.setdefault("x0", w)
        weight = rate * math.sqrt(step + 1)
        w *= 1 - rate * decay
        if momentum == 0:  # the iterate is the dual one, and a decay moves its start
            start = w + state.get("s", 0.0) / (state.get("v", 0.0) ** (1 / 3) + 1e-6)
        state["v"] = state.get("v", 0.0) + weight * g * g
        state["s"] = state.get("s", 0.0) + weight * g
        dual = start - state["s"] / (state["v"] ** (1 / 3) + 1e-6)
        return momentum * w + (1 - momentum) * dual

    ours = trained("madgrad_wd", momentum=momentum, eps=1e-6, weight_decay=decay)
    close(ours, each_number(update), 1e-5)


def naive_sm3(momentum: float, beta: float) -> list[torch.Tensor]:
    """SM3-II with loops: a bound for every row and column, the least of both for a number."""
    result = []
    for place, start in enumerate(parameters()):
        weight = start.detach().double()
        shape = weight.shape if weight.dim() == 2 else (len(weight), 1)
        weight = weight.view(shape)
        covers = [[0.0] * shape[0], [0.0] * shape[1] if start.dim() == 2 else None]
        moving = torch.zeros(shape, dtype=torch.float64)
        for step in range(6):
            slope = gradients(step)[place].double().view(shape)
            new: list[Any] = [[0.0] * shape[0], [0.0] * shape[1]]
            change = torch.zeros(shape, dtype=torch.float64)
            for i in range(shape[0]):
                for j in range(shape[1]):
                    bound = covers[0][i]
                    if covers[1] is not None:
                        bound = min(bound, covers[1][j])
                    bound = (beta * bound if beta else bound) + (1 - beta) * slope[i, j] ** 2
                    new[0][i], new[1][j] = max(new[0][i], bound), max(new[1][j], bound)
                    change[i, j] = slope[i, j] / math.sqrt(bound + 1e-30)
            for dim in (0, 1):
                if covers[dim] is not None:
                    old = covers[dim] if beta else [0.0] * len(covers[dim])
                    covers[dim] = [max(a, b) for a, b in zip(old, new[dim], strict=True)]
            moving = momentum * moving + (1 - momentum) * change if momentum else change
            weight = weight - 0.05 * moving
        result.append(weight.view(start.shape).float())
    return result


@pytest.mark.parametrize(("momentum", "beta"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.9), (0.5, 0.5)])
def test_sm3_is_the_papers(momentum: float, beta: float) -> None:
    close(trained("sm3", momentum=momentum, beta=beta, eps=1e-30), naive_sm3(momentum, beta), 1e-5)


@pytest.mark.parametrize("cut", [0, 1, 7, 15, 17, 25, 31])
def test_sm3_in_flat_pieces_takes_the_same_steps(cut: int) -> None:
    """Two "ranks" hold a flat half each, cut anywhere; what they would reduce is done by hand."""
    whole = [(f"p{place}", shape) for place, shape in enumerate(SHAPES)]
    starts, end = [], 0
    for shape in SHAPES:
        starts.append(end)
        end += math.prod(shape)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters()])
    halves = []
    for low, high in ((0, cut), (cut, end)):
        held = torch.nn.Parameter(flat[low:high].clone())
        fragments = [
            Fragment(
                name=name,
                shape=shape,
                start=max(low - start, 0),
                size=min(high, start + math.prod(shape)) - max(low, start),
                offset=max(start, low) - low,
            )
            for (name, shape), start in zip(whole, starts, strict=True)
            if max(low, start) < min(high, start + math.prod(shape))
        ]
        optimizer = SM3([{"params": [held]}], lr=0.05, beta=0.5, momentum=0.9)
        part = FlatPart(flat=held, fragments=fragments, whole=whole)
        optimizer.describe(held, cover_of(part, {}))
        halves.append((held, optimizer, slice(low, high)))
    for step in range(6):
        slope = torch.cat([gradient.reshape(-1) for gradient in gradients(step)])
        for held, optimizer, span in halves:
            held.grad = slope[span]
            optimizer.step()
        states = [optimizer.state[held] for held, optimizer, _ in halves]
        for name in ("sums_own", "sums_shared"):
            largest = torch.maximum(states[0][name], states[1][name])
            for state in states:
                state[name].copy_(largest)
    joined = torch.cat([held.detach() for held, _, _ in halves])
    expected = torch.cat(
        [one.reshape(-1) for one in trained("sm3", momentum=0.9, beta=0.5, eps=1e-30)]
    )
    assert torch.equal(joined, expected)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_fused_adam_is_the_plain_one(kind: str) -> None:
    plain_kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    for form in ({"foreach": False, "fused": False}, {"foreach": True}):
        held = parameters()
        plain = plain_kind(held, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, **form)
        for step in range(6):
            for parameter, gradient in zip(held, gradients(step), strict=True):
                parameter.grad = gradient
            plain.step()
        close(trained(kind, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), [*held], 1e-6)


def test_sgd_is_torchs() -> None:
    def update(state: dict[str, float], w: float, g: float, step: int) -> float:
        g += 0.1 * w
        state["b"] = g if step == 0 else 0.9 * state["b"] + g
        return w - 0.05 * (g + 0.9 * state["b"])

    params = {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.1}
    close(trained("sgd", **params), each_number(update))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adam8bit"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_is_what_the_table_says(kind: str, momentum: float) -> None:
    known = KINDS[kind]
    params = {**known.params, **({"momentum": momentum} if "momentum" in known.params else {})}
    held = parameters()
    optimizer = build_optimizer(
        [{"params": held, "weight_decay": 0.1}], kind=kind, lr=1.0, **params
    )
    for parameter, gradient in zip(held, gradients(0), strict=True):
        parameter.grad = gradient
    optimizer.step()
    state = optimizer.state[held[0]]
    elementwise = {
        name
        for name, value in state.items()
        if torch.is_tensor(value) and value.shape == held[0].shape
    }
    assert elementwise == set(known.state(params.get("momentum", 0.0)))
    assert ("step" in state) == known.counts


def test_eight_bits_need_a_gpu_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"params": parameters(), "weight_decay": 0.0}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        build_optimizer(groups, kind="adam8bit", lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError("no such package")
        return real(name, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        with pytest.raises(ConfigError, match="bitsandbytes, which is not installed"):
            build_optimizer(groups, kind="adam8bit", lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    module.Adam8bit = lambda groups, **params: (groups, params)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    made: Any = build_optimizer(groups, kind="adam8bit", lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    assert made[1] == {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
