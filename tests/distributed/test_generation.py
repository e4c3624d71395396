"""Continuations are the same whatever the layout that holds the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs
from support.gloo import run_ranks
from support.training import Harness

from megatron.engine.runtime import Runtime
from megatron.errors import DataError
from megatron.inference.crew import Crew, Decoding
from megatron.inference.generate import Prompt, generate
from megatron.inference.sample import Sampling
from megatron.inference.score import Request
from megatron.model.gpt import GPT
from megatron.tokenizer import build_tokenizer
from megatron.training.inference import crew_of

PROMPTS = [[3, 14, 15, 9, 26], [53, 58], [97]]
REQUESTS = [Request([3, 4, 5], [6, 7]), Request([9], [10, 11, 12]), Request([0], [1])]
STEPS = 3
NEW = 6


def write(folder: Path, **layout: Any) -> Path:
    content = runs.config(
        folder / "data",
        folder / "run",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        train_micro_batch_size_per_gpu=2,
        # Weights large enough for continuations that are not one token over and over.
        init_method_std=0.3,
        **layout,
    )
    name = "-".join(str(value) for value in layout.values()) or "whole"
    return runs.write_config(folder / f"{name.replace(' ', '')}.yml", content)


def body(rank: int, world_size: int, files: list[Path]) -> list[dict[str, Any]]:
    results = []
    for file in files:
        harness = Harness(file)
        harness.run(STEPS)
        engine, topology = harness.parts.engine, harness.parts.topology

        tokenizer = build_tokenizer("CharLevelTokenizer")
        crew = crew_of(harness.config, harness.runtime, topology, engine, tokenizer, rows=2)
        continued = partial(continuations, crew)
        before = harness.parts.validation.measure(engine).loss
        greedy = shared(harness.runtime, continued(Decoding()))
        results.append(
            {
                "greedy": greedy,
                "recomputed": continued(Decoding(recompute=True)),
                "drawn": continued(Decoding(sampling=Sampling(temperature=1.0, top_k=50, seed=7))),
                "stopped": continued(Decoding(stop_token=greedy[0][2])),
                "scores": crew.lead(lambda crew: [list(one) for one in crew.score(REQUESTS)]),
                "before": before,
                "after": harness.parts.validation.measure(engine).loss,
                "parameters": harness.parameters() if world_size == 1 else None,
            }
        )
        with pytest.raises(DataError, match="prompt 0 holds the token id 120"):
            generate(crew.model, [Prompt(tokens=[120], number=0, new_tokens=1)])
    return results


def continuations(crew: Crew, decoding: Decoding) -> list[list[int]] | None:
    """Continue the prompts; None on ranks that only follow."""
    prompts = [Prompt(tokens=t, number=n, new_tokens=NEW) for n, t in enumerate(PROMPTS)]
    return crew.lead(lambda crew: [one.tokens for one in crew.generate(prompts, decoding)])


def shared(runtime: Runtime, value: Any) -> Any:
    """Return rank 0's value."""
    return runtime.broadcast(value)


def test_every_layout_continues_alike(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    whole = run_ranks(body, 1, [write(tmp_path)])[0][0]
    layouts = [
        write(tmp_path, model_parallel_size=2),
        write(tmp_path, model_parallel_size=2, sequence_parallel=True),
        write(tmp_path, pipe_parallel_size=2),
        write(tmp_path, zero_optimization={"stage": 3}),
    ]
    assert whole["recomputed"] == whole["greedy"]
    leader, follower = run_ranks(body, 2, layouts)
    for layout, found, other in zip(layouts, leader, follower, strict=True):
        for kind in ("greedy", "recomputed", "drawn", "stopped"):
            assert found[kind] == whole[kind], (layout.stem, kind)
        for one, expected in zip(found["scores"], whole["scores"], strict=True):
            assert one == [pytest.approx(expected[0], abs=1e-4), expected[1]], layout.stem
        assert other["drawn"] is None
        assert found["before"].tolist() == found["after"].tolist()
    assert len({tuple(row) for row in whole["greedy"]}) == len(PROMPTS)
    assert all(len(row) == NEW for row in whole["greedy"])
    assert (
        whole["stopped"][0] == whole["greedy"][0][: whole["greedy"][0].index(whole["greedy"][0][2])]
    )
    assert whole["drawn"] != whole["greedy"]
    assert greedy_by_hand(tmp_path, whole["parameters"]) == whole["greedy"]


@pytest.mark.slow
def test_experts_continue_alike_wherever_they_are(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "sinkhorn"}
    whole = run_ranks(body, 1, [write(tmp_path, **experts)])[0][0]
    shared = {**experts, "moe_expert_parallel_size": 2}
    layouts = [
        write(tmp_path, **shared),
        write(tmp_path, **experts, zero_optimization={"stage": 3}),
        write(tmp_path, **experts, model_parallel_size=2, sequence_parallel=True),
    ]
    leader, _ = run_ranks(body, 2, layouts)
    assert whole["recomputed"] == whole["greedy"]
    for layout, found in zip(layouts, leader, strict=True):
        for kind in ("greedy", "recomputed", "drawn", "stopped"):
            assert found[kind] == whole[kind], (layout.stem, kind)
        for one, expected in zip(found["scores"], whole["scores"], strict=True):
            assert one == [pytest.approx(expected[0], abs=1e-4), expected[1]], layout.stem
    assert greedy_by_hand(tmp_path, whole["parameters"], **experts) == whole["greedy"]


def greedy_by_hand(folder: Path, parameters: dict[str, Any], **keys: Any) -> list[list[int]]:
    """Continue one prompt at a time, unpadded, with the whole model in this process."""
    from megatron.config import load_config

    model = GPT(load_config([str(write(folder, **keys))]).model, seed=0)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
    model.eval()
    continuations = []
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(NEW):
                hidden, weight = model(torch.tensor([tokens]))
                tokens.append(int((hidden[0, -1] @ weight[:120].T).argmax()))
            continuations.append(tokens[len(prompt) :])
    return continuations
