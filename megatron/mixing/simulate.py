"""Drive a mixer through a world with known truth, as a training loop drives it through a run.

``python -m megatron.mixing.simulate`` prints how far every method ends from the best fixed
mixture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.mixing.base import Mixer
from megatron.mixing.decision import Decision
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.worlds import World

Counts = npt.NDArray[np.int64]


class Draw(Protocol):
    """Turns a step's decision into samples per domain."""

    def __call__(self, step: int, weights: FloatArray, fresh_quota: int | None) -> Counts:
        """Return the counts of a step, [K]; they sum to the batch."""
        ...


class Apportion:
    """Whole samples by carried remainders; blocks of their own by largest remainder.

    Args:
        domains: their number.
        batch: samples of a step.
    """

    def __init__(self, domains: int, batch: int) -> None:
        self._batch = batch
        self._carry: FloatArray = np.zeros(domains)
        self._totals: FloatArray | None = None
        self._left = 0

    def __call__(self, step: int, weights: FloatArray, fresh_quota: int | None) -> Counts:
        """See :class:`Draw`."""
        if fresh_quota is not None:
            self._left, units = fresh_quota, fresh_quota * self._batch
            self._totals = _largest(weights * units, units).astype(np.float64)
            self._carry = np.zeros(len(weights))
        if self._totals is None:
            owed = self._carry + weights * self._batch
            counts = _largest(owed, self._batch)
            self._carry = owed - counts
            return counts
        counts = _largest(self._totals / self._left, self._batch)
        if self._left == 1:
            counts = np.rint(self._totals).astype(np.int64)
        self._totals, self._left = self._totals - counts, self._left - 1
        if self._left == 0:
            self._totals = None
        return counts


def _largest(owed: FloatArray, units: int) -> Counts:
    """Return whole numbers near ``owed`` that sum to ``units``, by largest remainder, [K]."""
    counts = np.maximum(np.floor(owed), 0.0).astype(np.int64)
    while (missing := units - int(counts.sum())) != 0:
        rest = owed - counts
        if missing > 0:
            counts[np.argsort(-rest, kind="stable")[:missing]] += 1
        else:
            taken = np.argsort(np.where(counts > 0, rest, np.inf), kind="stable")[:-missing]
            counts[taken] -= counts[taken] > 0
    return counts


class Multinomial:
    """Independent draws, keyed by a seed; blocks are drawn like any other step.

    Args:
        batch: samples of a step.
        seed: of the generator.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self._batch, self._rng = batch, np.random.default_rng(seed)

    def __call__(self, step: int, weights: FloatArray, fresh_quota: int | None) -> Counts:
        """See :class:`Draw`."""
        return self._rng.multinomial(self._batch, weights / weights.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """What a simulated run did.

    Attributes:
        steps: the recorded steps, rising, [N].
        losses: true losses after each of them, nats per token, [N, K].
        weights: what drew each of them, [N, K].
        drawn: samples of every domain over the whole run, [K].
        validations: how many measurements were asked for.
        probe_steps: how many steps trained on a probe mixture.
    """

    steps: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    drawn: Counts
    validations: int
    probe_steps: int

    @property
    def final(self) -> float:
        """The mean of the final losses, nats per token."""
        return float(self.losses[-1].mean())


def simulate(
    mixer: Mixer,
    world: World,
    *,
    steps: int,
    batch: int = 256,
    draw: Draw | None = None,
    noise: float = 0.0,
    seed: int = 0,
    record_every: int = 1,
    on_step: Callable[[int, Decision, Counts], None] | None = None,
) -> Simulated:
    """Train for ``steps`` steps: decide, measure if asked to, draw, train, observe.

    Args:
        mixer: the controller, before its first step.
        world: starts anew.
        steps: of the run.
        batch: samples of a step.
        draw: makes counts of weights; None = :class:`Apportion`.
        noise: standard deviation of the loss of one training sample, nats per token (the
            mean of n samples has noise / sqrt(n)); held-out losses are measured exactly.
        seed: of the noise.
        record_every: distance of the recorded steps; the last one always is.
        on_step: is told every step's decision and counts.
    """
    count = len(world.domains)
    draw = draw or Apportion(count, batch)
    rng = np.random.default_rng(seed)
    world.reset()
    kept: list[tuple[int, FloatArray, FloatArray]] = []
    drawn, validations, probes = np.zeros(count, dtype=np.int64), 0, 0
    for step in range(1, steps + 1):
        decision = mixer.decide(step)
        if decision.validate:
            validations += 1
            mixer.observe(Observation(step - 1, valid_loss=world.losses()))
            decision = mixer.decide(step)
        weights = decision.sampling_weights
        counts = draw(step, weights, decision.fresh_quota)
        losses = world.losses()
        if noise:
            scatter = noise / np.sqrt(np.maximum(counts, 1))
            losses = losses + scatter * rng.standard_normal(count)
        world.train(counts / batch)
        mixer.observe(
            Observation(
                step, loss_sum=losses * counts, token_count=counts, sampling_weights=weights
            )
        )
        drawn += counts
        probes += decision.probe is not None
        if on_step is not None:
            on_step(step, decision, counts)
        if step % record_every == 0 or step == steps:
            kept.append((step, world.losses().copy(), weights))
    return Simulated(
        steps=np.array([step for step, _, _ in kept]),
        losses=np.array([losses for _, losses, _ in kept]),
        weights=np.array([weights for _, _, weights in kept]),
        drawn=drawn,
        validations=validations,
        probe_steps=probes,
    )


def main() -> int:
    """Print the table."""
    from megatron.mixing.regret import as_table, compare

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each run")
    print(as_table(compare(steps=parser.parse_args().steps)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
