"""The arithmetic of probing: when each mixture is trained, and what its effect says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_SAME: Final = 1e-8
"""Mixtures whose matrix has a smaller singular value than this (relative) are not told apart."""


class ProbePlan:
    """The timetable of rounds that open with probes; a pure function of the step.

    Args:
        domains: names; the order of the probes does not depend on theirs.
        start: steps before the first round.
        every: steps of a round.
        sweeps: permutations of all probes at the start of a round.
        steps: steps of one probe.
        seed: keys the permutations.
    """

    def __init__(
        self, *, domains: Sequence[str], start: int, every: int, sweeps: int, steps: int, seed: int
    ) -> None:
        self.start, self.sweeps, self.steps = start, sweeps, steps
        self._every, self._seed = every, seed
        self._by_name = sorted(range(len(domains)), key=lambda place: domains[place])
        self._probing = sweeps * steps * len(domains)

    def round(self, step: int) -> int:
        """Return the round of a step, from 0."""
        return (step - self.start - 1) // self._every

    def _place(self, step: int) -> int:
        return (step - self.start - 1) % self._every

    def measures_before(self, step: int) -> bool:
        """Whether a step is the first of a probe, or the first after the last probe."""
        place = self._place(step)
        return place <= self._probing and place % self.steps == 0

    def is_over(self, step: int) -> bool:
        """Whether a step is the first after the last probe of its round."""
        return self._place(step) == self._probing

    def probe(self, step: int) -> int | None:
        """Return the probe that a step belongs to, as the index of its domain; None = no probe."""
        place = self._place(step)
        return self._nth(self.round(step), place // self.steps) if place < self._probing else None

    def ended_before(self, step: int) -> int | None:
        """Return the probe whose last step was the one before; None at the start of a round."""
        place = self._place(step)
        return self._nth(self.round(step), place // self.steps - 1) if place else None

    def _nth(self, round_: int, number: int) -> int:
        sweep, place = divmod(number, len(self._by_name))
        key = np.array([self._seed, round_ * self.sweeps + sweep], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(len(self._by_name))
        return self._by_name[int(np.argsort(words, kind="stable")[place])]


def influence(mixtures: Matrix, drop: Matrix, *, diagonal: bool) -> Matrix | None:
    """Solve for the effect of each domain on each loss from what probes showed.

    Args:
        mixtures: what each probe trained on, [probes, domains].
        drop: by how much each loss fell, [probes, losses].
        diagonal: take a loss to depend on its own domain alone (the losses of the domains
            come first; the others depend on none).

    Returns:
        A with A_ij = fall of loss i per probe of domain j alone, [losses, domains]; None
        where the mixtures are too alike to tell the domains apart.  A domain that no
        probe trained has no effect.
    """
    if not (np.isfinite(mixtures).all() and np.isfinite(drop).all()):
        return None
    if diagonal:
        own = np.diag(mixtures)
        effects = np.diag(drop) / np.where(own > 0, own, 1.0)
        alone = np.zeros((drop.shape[1], len(own)))
        np.fill_diagonal(alone, np.where(own > 0, effects, 0.0))
        return alone
    trained = mixtures.max(axis=0) > 0
    if not trained.any():
        return None
    solved, _, rank, _ = np.linalg.lstsq(mixtures[:, trained], drop, rcond=_SAME)
    if rank < trained.sum():
        return None
    matrix = np.zeros((drop.shape[1], mixtures.shape[1]))
    matrix[:, trained] = solved.T
    return matrix


def normalised_influence(matrix: Matrix) -> Matrix | None:
    """Shift by the least entry if it is negative, and scale to sum 1; None if nothing is left."""
    shifted = matrix - min(float(matrix.min()), 0.0)
    with np.errstate(over="ignore"):
        total = float(shifted.sum())
    if not np.isfinite(total) or total <= 0:
        return None
    return shifted / total
