"""Prompt tuning through DeepSpeed: the base model stays to the bit, the prompt learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pool import RankPools
from support.training import Harness
from support.tuned import loads_again, same, write

from megatron.model.soft_prompt import find_prompt
from megatron.training.soft_prompt import load_around_prompt, prompt_values

TEXT = "walk"
LENGTH = 6
STEPS = 24
PROMPT = {
    "soft_prompt_tuning": {"enabled": True, "num_tokens": LENGTH, "init_string": TEXT},
    "tokenizer_type": "CharLevelTokenizer",
}


@torch.no_grad()
def _loss(model: torch.nn.Module) -> float:
    """Of the same tokens each time; of this rank's part of the vocabulary where it is divided."""
    tokens = torch.arange(17).repeat(8, 1) % 20
    hidden, weight = model(tokens[:, :-1])
    logits = (hidden @ weight.T).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()


def body(rank: int, world_size: int, base: Path, tuned: Path) -> dict[str, Any]:
    """Train a base model, tune a prompt for it, and load what came of that into another run."""
    first = Harness(base)
    first.run(3)
    first.parts.engine.save(base.parent / "saved", "base", {})
    weights = first.parameters()
    first.close()

    second = Harness(tuned)
    engine = second.parts.engine
    before = prompt_values(engine)
    engine.load(base.parent / "saved", "base", weights_only=True)
    load_around_prompt(second.config, engine, before)
    words, prompt = find_prompt(engine.module)
    ids = torch.tensor([[*TEXT.encode(), *TEXT.encode()][:LENGTH]])
    started = torch.equal(prompt.weight.detach(), words(ids)[0].detach())
    start = prompt.weight.detach().clone()
    untuned = _loss(engine.module)
    second.run(STEPS)
    after = second.parameters()
    assert len(set(after) - set(weights)) == 1
    state = engine._optimizer.optimizer.state
    engine.save(base.parent / "saved", "tuned", {})
    result = {
        "started": started,
        "not drawn": not torch.equal(before, start),
        "base is the same": same(weights, after),
        "moved": bool((prompt.weight.detach() - start).abs().min() > 0),
        "losses": (untuned, _loss(engine.module)),
        "ledger": second.ledger,
        "states": sum(value["exp_avg"].numel() for value in state.values()),
    }
    second.close()
    result["loaded"] = loads_again(tuned, base.parent / "saved", "tuned", after)
    return result


@pytest.mark.option("soft_prompt_tuning")
@pytest.mark.parametrize(
    "layout",
    [
        {"zero_optimization": {"stage": 2}},
        pytest.param({"model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_prompt_learns_and_the_base_stays(
    pools: RankPools, tmp_path: Path, layout: dict[str, Any]
) -> None:
    result, other = pools.call(body, 2, *write(tmp_path, layout, PROMPT, steps=STEPS, lr=0.1))
    for name in ("started", "not drawn", "base is the same", "moved", "loaded"):
        assert result[name], name
    assert other["ledger"] == result["ledger"]
    untuned, tuned = result["losses"]
    assert tuned < untuned - 0.01
    # Two data ranks share the optimizer's state of the prompt, two tensor ranks both have it.
    assert result["states"] == LENGTH * 32 // (1 if "model_parallel_size" in layout else 2)
