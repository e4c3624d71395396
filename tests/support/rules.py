"""Mixing rules for the reference run, one of each kind of signal, written anew from METHODS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from support.store import made_up_losses

if TYPE_CHECKING:
    from support.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The global batch of a step.

    Attributes:
        drawn: domain's name, epoch and sample of each row.
        place: domain of each row, [G].
        tokens: the rows' windows, [G, S + 1].
        mask: which losses count, [G, S].
    """

    drawn: list[tuple[str, int, int]]
    place: np.ndarray
    tokens: torch.Tensor
    mask: torch.Tensor


class Rule:
    """What a mixing rule may do around a step; by itself, nothing."""

    def before(self, step: int, reference: Reference) -> None:
        """Look at the model before step ``step`` is decided."""

    def decide(self, step: int) -> np.ndarray:
        """Return the distribution of ``step``, [K]."""
        raise NotImplementedError

    def factors(self, step: int, reference: Reference, batch: Batch) -> np.ndarray | None:
        """Return the weight of each domain's tokens in the loss of a step, [K]; None = all 1."""
        return None

    def observe(
        self,
        step: int,
        loss: np.ndarray,
        seen: np.ndarray,
        drawn_by: np.ndarray,
        batch: Batch,
        losses: torch.Tensor,
    ) -> None:
        """Learn from a step: mean losses [K], who was seen [K], and every token's loss [G, S]."""


class Fixed(Rule):
    """Distributions that are a function of the step."""

    def __init__(self, by_step: Callable[[int], np.ndarray]) -> None:
        self.by_step = by_step

    def decide(self, step: int) -> np.ndarray:
        return self.by_step(step)


class Odm(Rule):
    """METHODS, ``odm``: importance-weighted reward, exponential weights."""

    def __init__(self, start: np.ndarray, alpha: float = 0.9) -> None:
        self.p = start / start.sum()
        self.alpha = alpha
        self.estimate = np.zeros(len(start))
        self.last_epsilon = 1.0 / len(start)

    def decide(self, step: int) -> np.ndarray:
        return self.p

    def observe(self, step, loss, seen, drawn_by, batch, losses) -> None:
        k = len(self.p)
        for i in range(k):
            if seen[i]:
                reward = loss[i] / drawn_by[i]
                self.estimate[i] = self.alpha * self.estimate[i] + (1 - self.alpha) * reward
        self.p, self.last_epsilon = explored(self.estimate, step, self.last_epsilon)


def explored(estimate: np.ndarray, step: int, last_epsilon: float) -> tuple[np.ndarray, float]:
    """Return (1 - K e_t) softmax(e_(t-1) R) + e_t, and e_t."""
    k = len(estimate)
    epsilon = min(1.0 / k, math.sqrt(math.log(k) / (k * step)))
    scores = last_epsilon * estimate
    exponentials = np.exp(scores - scores.max())
    p = (1 - k * epsilon) * exponentials / exponentials.sum() + epsilon
    return p / p.sum(), epsilon


class NaiveValidation(Rule):
    """METHODS, ``naive_validation``: every held-out loss, min-max scaled, added up."""

    def __init__(self, start: np.ndarray, *, every: int, samples: int) -> None:
        self.p = start / start.sum()
        self.every, self.samples = every, samples
        self.estimate = np.zeros(len(start))
        self.last_epsilon = 1.0 / len(start)

    def before(self, step: int, reference: Reference) -> None:
        """Update after the steps that are multiples of ``every``."""
        done = step - 1
        if done == 0 or done % self.every:
            return
        valid = reference.validation(self.samples)
        self.estimate += (valid - valid.min()) / (valid.max() - valid.min())
        self.p, self.last_epsilon = explored(self.estimate, done, self.last_epsilon)

    def decide(self, step: int) -> np.ndarray:
        return self.p


class Doremi(Rule):
    """METHODS, ``doremi`` with ``loss_lag: 1``: samples by r, losses weighed by alpha / r."""

    def __init__(self, r: np.ndarray, *, eta: float, smoothing: float, vocabulary: int) -> None:
        self.r = r / r.sum()
        self.eta, self.smoothing = eta, smoothing
        self.alpha = self.r.copy()
        self.score = np.full(len(r), math.log(vocabulary))
        self.history = [self.alpha]
        self.reference = made_up_losses()

    def decide(self, step: int) -> np.ndarray:
        return self.r

    def factors(self, step, reference, batch) -> np.ndarray:
        return self.alpha / self.r

    def observe(self, step, loss, seen, drawn_by, batch, losses) -> None:
        targets = batch.tokens[:, 1:].numpy()
        reference = np.stack(
            [
                self.reference[name][row]
                for (name, _, _), row in zip(batch.drawn, targets, strict=True)
            ]
        )
        excess = (losses.double() - torch.from_numpy(reference).double()).clamp(min=0)
        for k in range(len(self.r)):
            own = torch.from_numpy(batch.place == k)
            count = float(batch.mask[own].sum())
            if count:
                self.score[k] = float((excess[own] * batch.mask[own]).sum()) / count
        logs = np.log(self.alpha) + self.eta * self.score
        softmax = np.exp(logs - logs.max())
        softmax /= softmax.sum()
        self.alpha = (1 - self.smoothing) * softmax + self.smoothing / len(self.r)
        self.history.append(self.alpha)


class Doge(Rule):
    """METHODS, ``doge``, generalisation to all: each gradient against those of the others."""

    def __init__(self, weights: np.ndarray, *, mu: float, clip: float, bound: float) -> None:
        self.p = weights / weights.sum()
        self.mu, self.clip, self.bound = mu, clip, bound
        self.w = np.full(len(weights), 1.0 / len(weights))

    def decide(self, step: int) -> np.ndarray:
        return self.p

    def factors(self, step: int, reference: Reference, batch: Batch) -> np.ndarray:
        """Move w by this very batch's gradients, and weigh a token by w_i / n_i."""
        k = len(self.w)
        gradients = [self._gradient(reference, batch, domain) for domain in range(k)]
        norms = [float(g.norm()) for g in gradients]
        alignment = np.array(
            [sum(float(gradients[i] @ gradients[j]) for j in range(k) if j != i) for i in range(k)]
        ) / np.mean(norms)
        lr = reference.learning_rate(step)
        logs = np.log(self.w) + np.clip(lr * alignment, 0, self.clip * lr) / self.mu
        weights = np.exp(logs - logs.max())
        self.w = weights / weights.sum()
        counts = np.array(
            [float(batch.mask[torch.from_numpy(batch.place == d)].sum()) for d in range(k)]
        )
        return np.where(counts > 0, self.w / np.maximum(counts, 1), 0.0)

    def _gradient(self, reference: Reference, batch: Batch, domain: int) -> torch.Tensor:
        own = torch.from_numpy(batch.place == domain)
        size = sum(value.numel() for value in reference.weights.values())
        mask = batch.mask[own]
        if not mask.sum():
            return torch.zeros(size, dtype=torch.float64)
        tokens = batch.tokens[own]
        losses = reference.model.token_losses(reference.weights, tokens[:, :-1], tokens[:, 1:])
        loss = (losses * mask).sum() / mask.sum()
        parts = torch.autograd.grad(loss, list(reference.weights.values()))
        whole = torch.cat([part.double().flatten() for part in parts])
        norm = float(whole.norm())
        return whole * (self.bound / (norm + 1e-6)) if norm > self.bound else whole


def piecewise_linear(
    places: Sequence[int], distributions: Sequence[Sequence[float]]
) -> Callable[[int], np.ndarray]:
    """Return the function that is ``distributions[i]`` at step ``places[i]``, linear between."""
    table = np.array([np.array(row) / np.sum(row) for row in distributions])

    def at(step: int) -> np.ndarray:
        columns = [np.interp(step, places, table[:, k]) for k in range(table.shape[1])]
        return np.array(columns)

    return at
