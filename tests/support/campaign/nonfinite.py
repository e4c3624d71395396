"""R12: a loss, a gradient or a reward that is not finite, on one rank, at a random step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import runs
from support.campaign.row import Bench, Trial, attempt, must

STEPS = 6
KINDS = ("loss", "gradient", "reward")
VALUES = (float("nan"), float("inf"), float("-inf"))
POLICIES = ("stop", "skip(1)", "skip(3)")


def body(rank: int, world: int, file: Path, bad: dict[str, Any]) -> dict[str, Any]:
    """Train in a pool's rank; ``bad`` names where a value that is not finite appears.

    Args:
        rank: this rank.
        world: how many there are.
        file: the configuration.
        bad: ``rank``, ``steps``, ``kind`` (of ``KINDS``) and ``value``.
    """
    from support.training import Harness

    from megatron.errors import NeomixError

    harness = Harness(file)
    planner, module = harness.parts.planner, harness.parts.engine.module
    take, loss_fn = planner.take, module.loss_fn
    observe = planner.observe
    now, before = {"step": 0}, {}

    def strikes(kind: str) -> bool:
        # Rewards are reduced: what one rank spoils, all of them see.
        here = rank == bad["rank"] or kind == "reward"
        return here and bad["kind"] == kind and now["step"] in bad["steps"]

    def noting(step: int) -> Any:
        now["step"] = step
        before[step] = (harness.parameters(), planner._mixer.state_dict())
        return take(step)

    class Poisoned:
        def __call__(self, output: Any, labels: Any) -> torch.Tensor:
            hidden, weight = output
            if strikes("loss"):
                hidden = hidden * bad["value"]
            return loss_fn((hidden, weight), labels)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * bad["value"] if strikes("gradient") else gradient

    def observing(seen: Any) -> None:
        if strikes("reward"):
            spoiled = seen.loss_sum.copy()
            spoiled[np.argmax(seen.token_count)] = bad["value"]
            seen = replace(seen, loss_sum=spoiled)
        observe(seen)

    if bad["kind"] == "gradient":
        next(p for p in module.parameters() if p.requires_grad).register_hook(poison)
    planner.take, module.loss_fn, planner.observe = noting, Poisoned(), observing
    error = None
    try:
        harness.run(STEPS)
    except NeomixError as raised:
        error = (str(raised), raised.exit_code)
    after = (harness.parameters(), planner._mixer.state_dict())
    harness.close()
    return {"ledger": harness.ledger, "error": error, "before": before, "after": after}


def write(folder: Path, data: Path, policy: str, stage: int, **changes: Any) -> Path:
    """Write the configuration of such a run."""
    content = runs.config(
        data,
        folder / "run",
        train_iters=STEPS,
        on_nonfinite=policy,
        zero_optimization={"stage": stage},
        mixing={"method": "smoothed_mean"},
        **changes,
    )
    return runs.write_config(folder / "config.yml", content)


def poisoned(bench: Bench, trials: int) -> Iterator[Trial]:
    """R12: whatever is not finite changes no parameter and no mixing weight, on any rank."""
    data = bench.folder / "data"
    runs.make_data(data)
    for number in range(trials):
        yield attempt(partial(_poison_once, bench, data, bench.chance(number), number))


def _poison_once(bench: Bench, data: Path, chance: random.Random, number: int) -> None:
    kind, policy = KINDS[number % len(KINDS)], chance.choice(POLICIES)
    stage = chance.choice([1, 2, 3])
    bad = {
        "rank": chance.randrange(2),
        "steps": (chance.randint(2, STEPS - 2),),
        "kind": kind,
        "value": chance.choice(VALUES),
    }
    told = f"{kind} {bad['value']} on rank {bad['rank']} at {bad['steps']}, {policy}, ZeRO {stage}"
    file = write(bench.fresh(f"poison{number}"), data, policy, stage)
    results = bench.pools.call(body, 2, file, bad)
    (step,) = bad["steps"]
    stops = kind != "reward" and policy in ("stop", "skip(1)")
    must(len({str(result["error"]) for result in results}) == 1, f"{told}: ranks differ")
    for result in results:
        (old, mixture), ledger = result["before"][step], result["ledger"]
        new, mixture_after = result["after"] if stops else result["before"][step + 1]
        same = all(np.array_equal(old[name], new[name]) for name in old)
        must(mixture == mixture_after, f"{told}: the mixture changed")
        if stops:
            must(result["error"] is not None and result["error"][1] == 1, f"{told}: went on")
            must(f"step {step}" in result["error"][0], f"{told}: {result['error'][0]}")
            must(len(ledger) == step - 1, f"{told}: {len(ledger)} steps")
        else:
            must(result["error"] is None, f"{told}: {result['error']}")
            must(len(ledger) == STEPS, f"{told}: {len(ledger)} steps")
        # A reward that is not finite says nothing against the step's gradient.
        must(same or kind == "reward", f"{told}: parameters changed")
