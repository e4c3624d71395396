"""Made-up training runs whose laws, and whose best mixtures, are known exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron.mixing.observation import FloatArray
from megatron.mixing.repetition import effective_data, marginal_value
from megatron.mixing.simplex import project

Matrix = npt.NDArray[np.float64]

_GAP: Final = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """The fixed mixture that ends with the least mean loss.

    Attributes:
        weights: the mixture, [K].
        losses: the losses that it ends with, nats per token, [K] (of a world with targets:
            theirs at the end, [K + M]).
        gap: how much lower the mean loss could be at most (a duality gap; 0 = exact).
        objective: how much each loss counts in the mean, of the form of ``losses``; None =
            all alike.
    """

    weights: FloatArray
    losses: FloatArray
    gap: float
    objective: FloatArray | None = None

    @property
    def value(self) -> float:
        """The mean of the final losses, nats per token."""
        if self.objective is not None:
            return float(self.objective @ self.losses)
        return float(self.losses.mean())


class World(ABC):
    """Domains whose losses follow from what has been trained on.

    Time runs in steps; a step trains on shares of the domains that sum to 1.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...] = ()
    """Names of the M domains that are measured and cannot be trained on."""

    def target_losses(self) -> FloatArray:
        """Return the present losses of the targets, nats per token, [M]."""
        return np.zeros(0)

    @abstractmethod
    def reset(self) -> None:
        """Go back to before the first step."""

    @abstractmethod
    def losses(self) -> FloatArray:
        """Return the present losses, nats per token, [K]."""

    @abstractmethod
    def train(self, shares: FloatArray) -> None:
        """Take one step on ``shares`` of the domains, [K]."""

    @abstractmethod
    def slopes(self) -> Matrix:
        """Return how fast the losses fall now, [K, K]: loss i in a step on domain j alone."""

    @abstractmethod
    def best_fixed(self, steps: int) -> Optimum:
        """Return the best fixed mixture for a run of ``steps``."""


class LinearWorld(World):
    """L(t + 1) = L(t) - A(t) p(t), with A(t) = A / (1 + t / half_life).

    A_ij is the fall of loss i in a first step on domain j alone, so the mean loss falls
    fastest on the domain of the largest column sum, at every step: the best fixed
    mixture is that domain alone, and no schedule is better.

    Source: the law of Aioli (arXiv 2411.05735), equation 2.

    Args:
        start: losses before the first step, [K].
        matrix: A, [K, K].
        half_life: steps after which a step does half as much; None = never.
    """

    def __init__(self, *, start: FloatArray, matrix: Matrix, half_life: float | None) -> None:
        self.domains = tuple(f"d{i}" for i in range(len(start)))
        self.matrix, self._start, self._half_life = matrix, start, half_life
        self.reset()

    def reset(self) -> None:
        """See :class:`World`."""
        self._losses, self._time = self._start.copy(), 0

    def losses(self) -> FloatArray:
        """See :class:`World`."""
        return self._losses

    def _rate(self, time: npt.ArrayLike) -> FloatArray:
        times = np.asarray(time, dtype=np.float64)
        if self._half_life is None:
            return np.ones(times.shape)
        return 1.0 / (1.0 + times / self._half_life)

    def train(self, shares: FloatArray) -> None:
        """See :class:`World`."""
        self._losses = self._losses - float(self._rate(self._time)) * (self.matrix @ shares)
        self._time += 1

    def slopes(self) -> Matrix:
        """See :class:`World`."""
        return float(self._rate(self._time)) * self.matrix

    def best_fixed(self, steps: int) -> Optimum:
        """See :class:`World`; one domain alone."""
        weights = np.zeros(len(self.domains))
        weights[int(np.argmax(self.matrix.sum(axis=0)))] = 1.0
        total = float(self._rate(np.arange(steps)).sum())
        return Optimum(
            weights=weights, losses=self._start - total * (self.matrix @ weights), gap=0.0
        )


class PowerWorld(World):
    """L_i = epsilon_i + beta_i n_i^(-alpha_i), with n = offset + T D'(batch m).

    m_j is the number of steps spent on domain j (a sum of shares), D' what its samples are
    worth where they repeat, and T_ij says how much a sample of domain j counts for domain i.
    Final losses depend on m alone and are convex in it, so the best fixed mixture is as good
    as any schedule of the same length.

    Args:
        epsilon: irreducible losses, nats per token, [K + M].
        beta: [K + M].
        alpha: [K + M].
        transfer: T, [K + M, K], at least 0; rows beyond the K-th are of targets, whose losses
            fall by transfer alone.
        batch: samples of a step.
        offset: samples that a start from scratch is worth; keeps the first loss finite.
        unique: samples of each domain before they repeat, [K]; None = they never do.
    """

    def __init__(
        self,
        *,
        epsilon: FloatArray,
        beta: FloatArray,
        alpha: FloatArray,
        transfer: Matrix,
        batch: int,
        offset: float,
        unique: FloatArray | None = None,
    ) -> None:
        self.unique = np.full(transfer.shape[1], np.inf) if unique is None else unique
        count = transfer.shape[1]
        self.domains = tuple(f"d{i}" for i in range(count))
        self.targets = tuple(f"t{i}" for i in range(len(epsilon) - count))
        self.epsilon, self.beta, self.alpha = epsilon, beta, alpha
        self.transfer, self._batch, self._offset = transfer, batch, offset
        self.reset()

    def reset(self) -> None:
        """See :class:`World`."""
        self._spent = np.zeros(len(self.domains))

    def losses(self) -> FloatArray:
        """See :class:`World`."""
        return self._at(self._spent)[: len(self.domains)]

    def target_losses(self) -> FloatArray:
        """See :class:`World`."""
        return self._at(self._spent)[len(self.domains) :]

    def _at(self, spent: FloatArray) -> FloatArray:
        return self.epsilon + self.beta * self._data(spent) ** -self.alpha

    def _data(self, spent: FloatArray) -> FloatArray:
        """Return n, [K + M]."""
        return np.asarray(
            self._offset + self.transfer @ effective_data(self._batch * spent, self.unique)
        )

    def _worth(self, spent: FloatArray) -> FloatArray:
        """Return what a step on each domain alone adds to its own data, [K]."""
        return self._batch * marginal_value(self._batch * spent, self.unique)

    def train(self, shares: FloatArray) -> None:
        """See :class:`World`."""
        self._spent = self._spent + shares

    def slopes(self) -> Matrix:
        """See :class:`World`; to first order."""
        own = self.alpha * self.beta * self._data(self._spent) ** (-self.alpha - 1.0)
        worth = self._worth(self._spent)
        return np.asarray(own[:, None] * self.transfer * worth)[: len(self.domains)]

    def best_fixed(self, steps: int, objective: FloatArray | None = None) -> Optimum:
        """See :class:`World`; accelerated projected gradient, to a tiny duality gap.

        Args:
            steps: of the run.
            objective: how much each loss counts, [K + M], sum 1; None = those of the domains
                alike.
        """
        count, given = len(self.domains), objective
        if objective is None:
            objective = np.repeat([1.0 / count, 0.0], (count, len(self.targets)))
            given = objective if self.targets else None
        counted: FloatArray = objective

        def gradient(p: FloatArray) -> FloatArray:
            n, worth = self._data(steps * p), self._worth(steps * p) * steps
            slope = -self.alpha * self.beta * n ** (-self.alpha - 1.0)
            return np.asarray(worth * (self.transfer.T @ (slope * counted)))

        def value(p: FloatArray) -> float:
            return float(counted @ self._at(steps * p))

        p = np.full(count, 1.0 / count)
        low, high = np.zeros(count), np.ones(count)
        ahead, momentum, rate, gap = p, 1.0, 1.0, np.inf
        for _ in range(20_000):
            slope = gradient(ahead)
            while True:  # the step is halved until the quadratic bound holds
                moved = project(ahead - rate * slope, low, high)
                change = moved - ahead
                bound = value(ahead) + slope @ change + change @ change / (2 * rate)
                if value(moved) <= bound + 1e-15 or rate < 1e-12:
                    break
                rate /= 2.0
            slope = gradient(moved)
            gap = float(slope @ moved - slope.min())
            if gap <= _GAP:
                p = moved
                break
            restart = (ahead - moved) @ (moved - p) > 0
            following = 1.0 if restart else (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
            ahead = moved if restart else moved + (momentum - 1.0) / following * (moved - p)
            if (self._data(steps * ahead) <= 0).any():
                ahead = moved  # so far ahead there is no loss
            p, momentum = moved, following
            rate *= 1.1
        losses = self._at(steps * p)
        return Optimum(weights=p, losses=losses, gap=max(gap, 0.0), objective=given)


def random_linear(domains: int, *, seed: int, half_life: float | None = None) -> LinearWorld:
    """Return a linear world with a random A in which domains mostly help themselves."""
    rng = np.random.default_rng(seed)
    matrix = 2e-4 * (
        rng.uniform(0.0, 0.5, (domains, domains)) + np.diag(rng.uniform(1, 3, domains))
    )
    return LinearWorld(start=rng.uniform(6, 9, domains), matrix=matrix, half_life=half_life)


def power_world(
    *, transfer: Sequence[Sequence[float]] | Matrix | None = None, batch: int = 256
) -> PowerWorld:
    """Return the seven power laws of the documentation, with or without transfer."""
    return PowerWorld(
        epsilon=np.array([1.6, 1.9, 0.7, 2.1, 1.2, 0.4, 1.8]),
        beta=np.array([12.0, 9.0, 18.0, 7.0, 15.0, 22.0, 8.0]),
        alpha=np.array([0.24, 0.18, 0.34, 0.14, 0.28, 0.42, 0.20]),
        transfer=np.eye(7) if transfer is None else np.asarray(transfer, dtype=np.float64),
        batch=batch,
        offset=50.0,
    )


def target_world(*, batch: int = 256) -> PowerWorld:
    """Return four domains, and a target that two of them teach and that nothing trains on."""
    transfer = np.vstack((np.eye(4), [0.02, 0.6, 0.0, 0.3]))
    return PowerWorld(
        epsilon=np.array([1.6, 1.9, 0.7, 1.2, 1.4]),
        beta=np.array([12.0, 9.0, 18.0, 15.0, 14.0]),
        alpha=np.array([0.24, 0.18, 0.34, 0.28, 0.25]),
        transfer=transfer,
        batch=batch,
        offset=50.0,
    )


def scarce_world(*, steps: int, batch: int = 256) -> PowerWorld:
    """Return the seven power laws where some domains repeat within a run of ``steps``.

    Read evenly, three of them are read 40, 20 and 10 times, and the others less than once.
    """
    world = power_world(batch=batch)
    even = steps * batch / 7.0
    unique = even * np.array([1.0 / 40, 3.0, 3.0, 1.0 / 20, 3.0, 3.0, 1.0 / 10])
    return PowerWorld(
        epsilon=world.epsilon,
        beta=world.beta,
        alpha=world.alpha,
        transfer=world.transfer,
        batch=batch,
        offset=50.0,
        unique=unique,
    )


def hub_transfer() -> Matrix:
    """Return a transfer in which two domains teach the others much and learn little back."""
    transfer = np.eye(7)
    transfer[[1, 2, 3], 0] = (0.7, 0.5, 0.6)
    transfer[[4, 5, 6], 3] = (0.4, 0.6, 0.5)
    transfer[0, 1] = transfer[3, 6] = 0.1
    return transfer
