"""Runs of the same scenario in many layouts, and how far they are from the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.scenarios import STEPS, Order, loss_weights
from support.training import Harness

from megatron.mixing.base import Decision
from megatron.parallel.layout import Layout
from megatron.parallel.partition import Partition
from megatron.training.loop import Ending

# Inside a rank.


class Weighted:
    """A mixer whose decisions weigh the domains' tokens too."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def decide(self, step: int) -> Decision:
        """Decide as the inner mixer does."""
        decision = self._inner.decide(step)
        return Decision(sampling_weights=decision.sampling_weights, loss_weights=loss_weights(step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Ordered(Harness):
    """A harness that measures and keeps what it is told to between steps."""

    def __init__(self, file: Path, order: Order) -> None:
        super().__init__(file)
        self.order = order
        self.valid: dict[int, list[float]] = {}
        self.kept: dict[int, dict[str, np.ndarray]] = {}
        if order.weighted:
            self.parts.planner._mixer = Weighted(self.parts.planner._mixer)

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Measure and keep what is due."""
        if step in self.order.validate:
            self.valid[step] = self.parts.validation.measure(self.parts.engine).loss.tolist()
        if step in self.order.keep:
            self.kept[step] = self.parameters()


def train(rank: int, world_size: int, file: Path, order: Order) -> dict[str, Any]:
    """Train as ordered, in one rank; return what it saw."""
    harness = Ordered(file, order)
    try:
        harness.after_step(0, None)
        harness.run(order.steps)
        return {
            "ledger": harness.ledger,
            "state": harness.parts.planner.state_dict(),
            "valid": harness.valid,
            "kept": harness.kept,
        }
    finally:
        harness.close()


# What came of it.


def whole(
    kept: Sequence[Mapping[str, np.ndarray]], cuts: Mapping[str, Partition | None], layout: Layout
) -> dict[str, np.ndarray]:
    """Put the ranks' parts together; what several ranks hold has to be the same to the bit.

    Args:
        kept: by rank, the parts by name.
        cuts: how the tensor ranks divide each parameter.
        layout: of the ranks.
    """
    found: dict[str, dict[tuple[int, int], list[np.ndarray]]] = {}
    for rank, parts in enumerate(kept):  # tensor ranks follow each other
        place = layout.coordinates(rank)
        for name, value in parts.items():
            found.setdefault(name, {}).setdefault((place.pipe, place.data), []).append(value)
    result: dict[str, np.ndarray] = {}
    for name, groups in found.items():
        copies = [_joined(group, cuts[name]) for group in groups.values()]
        for copy in copies[1:]:
            assert np.array_equal(copies[0], copy), f"{name} differs between data ranks or stages"
        result[name] = copies[0]
    return result


def _joined(parts: list[np.ndarray], cut: Partition | None) -> np.ndarray:
    if cut is None:
        for part in parts[1:]:
            assert np.array_equal(parts[0], part), "a replicated parameter differs"
        return parts[0]
    padded = cut.join([torch.from_numpy(part) for part in parts])
    extra = padded[cut.padded_from :] if cut.padded_from is not None else padded[:0]
    assert not extra.any(), "padding is not zero"
    return cut.unpad(padded).numpy()


def allowed(step: int) -> float:
    """Relative difference that fp32 may show after so many steps."""
    if step <= 1:
        return 1e-6
    return 1e-5 if step <= 10 else 1e-4


def relative(one: Any, other: Any) -> float:
    """Return the largest relative difference; what is NaN in one has to be NaN in both."""
    first, second = np.atleast_1d(np.array(one, float)), np.atleast_1d(np.array(other, float))
    assert np.array_equal(np.isnan(first), np.isnan(second)), f"{first} and {second}"
    there = ~np.isnan(first)
    if not there.any():
        return 0.0
    scale = np.where(second == 0, 1.0, np.abs(second))
    return float((np.abs(first - second) / scale)[there].max())


COMPARED = ("domain_loss", "grad_norm", "weights")


def assert_ranks_agree(results: Sequence[Mapping[str, Any]]) -> None:
    """Check that every rank saw the same ledger and holds the same state, to the bit."""
    for name in ("ledger", "state", "valid"):
        texts = [json.dumps(result[name], sort_keys=True) for result in results]
        assert len(set(texts)) == 1, f"the ranks differ in {name}"


def assert_equal(
    ledger: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    bound: Callable[[int], float] = allowed,
    compared: Sequence[str] = COMPARED,
) -> dict[str, dict[int, float]]:
    """Check a run's ledger against the reference's.

    Returns:
        The worst relative difference of each quantity at step 1, and up to 10 and all steps.
    """
    worst = {name: {1: 0.0, 10: 0.0, STEPS: 0.0} for name in compared}
    for own, other in zip(ledger, records[: len(ledger)], strict=True):
        step = own["step"]
        assert step == other["step"]
        assert own["samples"] == other["samples"], f"step {step} drew other samples"
        assert own["tokens"] == other["tokens"], f"step {step} counts other tokens"
        assert relative(own["lr"], other["lr"]) < 1e-12, f"step {step} has another learning rate"
        assert not own["skipped"]
        if own["loss_weights"] is not None:
            difference = relative(own["loss_weights"], other["loss_weights"])
            assert difference <= bound(step), f"step {step}: loss weights differ by {difference}"
        for name in compared:
            difference = relative(own[name], other[name])
            assert difference <= bound(step), (
                f"step {step}: {name} differs by {difference:.2g}: {own[name]}, {other[name]}"
            )
            for until in worst[name]:
                if step <= until:
                    worst[name][until] = max(worst[name][until], difference)
    return worst
