"""Runs of an optimizer in one layout: losses, norms, and a checkpoint taken up again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.training import Harness

from megatron.config import load_config
from megatron.engine.transfer import all_to_device
from megatron.engine.universal import convert_to_universal, universal_info
from megatron.model.gpt import GPT
from megatron.training.loop import Ending


class Watched(Harness):
    """A harness that keeps what observers measured, and saves after a step."""

    def __init__(self, file: Path, save: Path | None = None, at: int = 0) -> None:
        super().__init__(file)
        self.save, self.at = save, at
        self.statistics: dict[int, dict[str, float]] = {}

    def step(self, planned: Any, totals: Any, outcome: Any, *, lr: float, skipped: bool) -> None:
        """Keep what the recorder is told."""
        super().step(planned, totals, outcome, lr=lr, skipped=skipped)
        self.statistics[planned.step] = dict(outcome.statistics)

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Save where that is due."""
        if self.save is not None and step == self.at:
            whole = GPT(self.config.model, seed=self.config.training.seed, device="meta")
            assert self.config.model.vocab_size is not None
            info = universal_info(dict(whole.named_parameters()), self.config.model.vocab_size)
            self.parts.engine.save(
                self.save, "step", {"iteration": step, "universal_checkpoint_info": info}
            )
            dist.barrier()

    def go_on(self, first: int, last: int) -> None:
        """Train from the step after ``first``, with the plans of those before passed over."""
        for step in range(1, first + 1):
            assert self.parts.planner.take(step) is not None
        try:
            self.loop().run(start=first, last=last)
        finally:
            self.parts.close()


def _seen(harness: Watched) -> dict[str, Any]:
    return {
        "losses": [record["domain_loss"] for record in harness.ledger],
        "norms": [record["grad_norm"] for record in harness.ledger],
        "statistics": harness.statistics,
        "parameters": harness.parameters(),
    }


def train_and_save(
    rank: int, world: int, file: Path, steps: int, save: Path | None, at: int
) -> dict[str, Any]:
    """Train ``steps`` steps, saving after step ``at``; return what was seen."""
    harness = Watched(file, save, at)
    try:
        harness.run(steps)
        return _seen(harness)
    finally:
        harness.close()


def train_on(
    rank: int,
    world: int,
    file: Path,
    saved: Path,
    first: int,
    last: int,
    universal: bool,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Take up what :func:`train_and_save` saved, and train to ``last``."""
    harness = Watched(file)
    try:
        engine, topology = harness.parts.engine, harness.parts.topology
        if universal:
            engine.load_universal(
                saved / "universal",
                tensor_rank=topology.tensor_rank,
                tensor_size=topology.tensor_size,
                weights_only=weights_only,
            )
        else:
            engine.load(saved, "step", weights_only=weights_only)
        harness.go_on(first, last)
        return _seen(harness)
    finally:
        harness.close()


def convert(saved: Path, state: tuple[str, ...]) -> None:
    """Write the universal form beside."""
    shutil.rmtree(saved / "universal", ignore_errors=True)
    convert_to_universal(saved / "step", saved / "universal", state=state)


def expected_statistics(rank: int, world: int, file: Path) -> dict[str, Any]:
    """Work out the first step's numbers in one process, by torch alone.

    Returns:
        Norms and shares of zeros by name, and the noise scale from micro-batches' gradients.
    """
    harness = Watched(file)
    config = load_config([str(file)])
    try:
        parts = harness.parts
        planned = parts.planner.take(1)
        model = GPT(harness.config.model, seed=config.training.seed, loss_fn=None)
        model.loss_fn = parts.engine.module.loss_fn
        whole = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        squares, count = 0.0, 0
        for tokens, labels in all_to_device(parts.reader.read(planned), torch.device("cpu")):
            model.zero_grad()
            model(tokens, labels).backward()
            count += 1
            for name, value in model.named_parameters():
                squares += float(value.grad.double().square().sum())
                whole[name] += value.grad
        mean = {name: value / count for name, value in whole.items()}
        return {
            "gradient_norms": {name: float(value.norm()) for name, value in mean.items()},
            "small": squares / count,
            "big": sum(float(value.double().square().sum()) for value in mean.values()),
            "count": count,
        }
    finally:
        harness.close()
