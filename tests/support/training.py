"""A run's parts inside one rank of the test harness, without launcher, lock or files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import numpy as np

import megatron.mixing  # noqa: F401
from megatron.config import Config, load_config
from megatron.engine.runtime import Runtime, start_runtime
from megatron.training.build import Parts, build
from megatron.training.check import preflight
from megatron.training.domains import OpenDomains
from megatron.training.loop import Ending, Loop


class Harness:
    """Builds what a configuration describes and runs its loop step by step."""

    def __init__(self, file: Path) -> None:
        self.runtime: Runtime = start_runtime(deterministic=True)
        checked = preflight(load_config([str(file)]), world_size=self.runtime.world_size, gpus=0)
        self.config: Config = checked.config
        self.domains: OpenDomains = checked.domains
        self.parts: Parts = build(self.config, self.runtime, self.domains, checked.mixer)
        self.ledger: list[dict[str, Any]] = []

    def loop(self) -> Loop:
        """Return the loop, with a recorder that keeps everything."""
        parts = self.parts
        return Loop(
            engine=parts.engine,
            planner=parts.planner,
            reader=parts.reader,
            foresight=parts.foresight,
            ledger=parts.ledger,
            guard=parts.guard,
            recorder=self,
            learning_rate=parts.learning_rate,
            stop_requested=lambda: False,
            exits_at=lambda step: False,
            after_step=self.after_step,
            device=self.runtime.device,
        )

    def step(self, planned: Any, totals: Any, outcome: Any, *, lr: float, skipped: bool) -> None:
        """Keep what the recorder is told."""
        self.ledger.append(
            {
                "step": planned.step,
                "domain_loss": totals.domain_loss.tolist(),
                "tokens": totals.token_count.tolist(),
                "grad_norm": float(outcome.grad_norm) if outcome.grad_norm is not None else None,
                "weights": planned.plan.weights.tolist(),
                "loss_weights": _scaled(planned.decision.loss_weights),
                "samples": planned.plan.sample_ids(self.domains.names),
                "lr": lr,
                "skipped": skipped,
            }
        )

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Nothing is due here."""

    def run(self, last: int) -> tuple[int, Ending]:
        """Train to ``last``."""
        try:
            return self.loop().run(start=0, last=last)
        finally:
            self.parts.close()

    def close(self) -> None:
        """Let go of files, hooks and memory, so that this process can build another."""
        self.parts.close()
        self.domains.close()
        self.parts.engine._engine.destroy()

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the model's parameters by name."""
        named = dict(self.parts.engine.module.named_parameters())
        # Under ZeRO-3 a rank holds only its part of them between steps.
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: value.detach().float().numpy().copy() for name, value in named.items()}


def _scaled(weights: np.ndarray | None) -> list[float] | None:
    """Scale weights in a loss to sum 1: only their ratios count."""
    return None if weights is None else (weights / weights.sum()).tolist()
