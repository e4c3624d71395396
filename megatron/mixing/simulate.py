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

from megatron.mixing.controller import Controller
from megatron.mixing.decision import Decision
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.reported import Reported
from megatron.mixing.simulated_signals import SimulatedSignals
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
        said: what reviews said, with their steps.
        fallback_steps: how many steps a guardrail's fallback drew.
        result: the mixture that the method hands on, [K]; None for most.
    """

    steps: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    drawn: Counts
    validations: int
    probe_steps: int
    said: tuple[tuple[int, str], ...] = ()
    fallback_steps: int = 0
    result: FloatArray | None = None

    @property
    def final(self) -> float:
        """The mean of the final losses, nats per token."""
        return float(self.losses[-1].mean())


class HeldOut:
    """A report validation: fixed windows, some harder than others, measured with noise.

    Args:
        domains: their number.
        windows: of each domain.
        spread: standard deviation of how hard windows are, nats per token; the same at
            every measurement.
        noise: standard deviation of what a measurement of one window adds, nats per token.
        seed: of both.
    """

    def __init__(
        self,
        domains: int,
        *,
        windows: int = 64,
        spread: float = 0.5,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._rng, self._noise = np.random.default_rng(seed), noise
        self._hard = spread * self._rng.standard_normal((domains, windows))
        self._of = np.repeat(np.arange(domains), windows)

    def measure(self, step: int, losses: FloatArray) -> Reported:
        """Return what is reported of the losses, [K], after ``step``."""
        scatter = self._noise * self._rng.standard_normal(self._hard.shape)
        windows = losses[:, None] + self._hard + scatter
        return Reported(
            step=step,
            loss=windows.mean(axis=1),
            window_loss=windows.ravel(),
            window_domain=self._of,
        )


def simulate(
    mixer: Controller,
    world: World,
    *,
    steps: int,
    batch: int = 256,
    draw: Draw | None = None,
    noise: float = 0.0,
    seed: int = 0,
    record_every: int = 1,
    review_every: int | None = None,
    held_out: HeldOut | None = None,
    signals: SimulatedSignals | None = None,
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
        review_every: distance of the report validations that the controller is told of;
            None = none.
        held_out: makes them; None = :class:`HeldOut` without noise.
        signals: what there is to measure beside losses; None = :class:`SimulatedSignals` as
            they come.
        on_step: is told every step's decision and counts.
    """
    count = len(world.domains)
    draw = draw or Apportion(count, batch)
    rng = np.random.default_rng(seed)
    world.reset()
    signals = signals or SimulatedSignals(world, mixer, steps=steps)
    kept: list[tuple[int, FloatArray, FloatArray]] = []
    drawn, validations, probes, fallback = np.zeros(count, dtype=np.int64), 0, 0, 0
    held_out, said = held_out or HeldOut(count), []
    for step in range(1, steps + 1):
        decision = mixer.decide(step)
        if decision.validate:
            validations += 1
            targets = world.target_losses() if world.targets else None
            mixer.observe(Observation(step - 1, valid_loss=world.losses(), target_loss=targets))
            decision = mixer.decide(step)
        weights = decision.sampling_weights
        counts = draw(step, weights, decision.fresh_quota)
        losses = world.losses()
        if noise:
            scatter = noise / np.sqrt(np.maximum(counts, 1))
            losses = losses + scatter * rng.standard_normal(count)
        if decision.measure:
            measured = signals.ahead(decision.measure, losses, counts.astype(np.float64))
            decision = mixer.foresee(Observation(step, **measured))  # type: ignore[arg-type]
        world.train(_trained_on(counts, decision))
        mixer.observe(
            Observation(
                step,
                loss_sum=losses * counts,
                token_count=counts,
                sampling_weights=weights,
                **signals.trained(losses, counts.astype(np.float64)),  # type: ignore[arg-type]
            )
        )
        drawn += counts
        probes += decision.probe is not None
        fallback += decision.control == "fallback"
        if on_step is not None:
            on_step(step, decision, counts)
        if review_every is not None and step % review_every == 0:
            text = mixer.review(held_out.measure(step, world.losses()))
            said += [] if text is None else [(step, text)]
        if step % record_every == 0 or step == steps:
            kept.append((step, world.losses().copy(), weights))
    return Simulated(
        steps=np.array([step for step, _, _ in kept]),
        losses=np.array([losses for _, losses, _ in kept]),
        weights=np.array([weights for _, _, weights in kept]),
        drawn=drawn,
        validations=validations,
        probe_steps=probes,
        said=tuple(said),
        fallback_steps=fallback,
        result=mixer.result() if hasattr(mixer, "result") else None,
    )


def _trained_on(counts: Counts, decision: Decision) -> FloatArray:
    """Return the shares of the domains in what a step learns from, [K]."""
    weighted = counts * (1.0 if decision.loss_weights is None else decision.loss_weights)
    return np.asarray(weighted / weighted.sum(), dtype=np.float64)


def main() -> int:
    """Print the table."""
    from megatron.mixing.regret import as_table, compare

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each run")
    print(as_table(compare(steps=parser.parse_args().steps)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
