"""Domains edited between two launches: what was edited, and a run's state after it.  No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config import DomainConfig
from megatron.data.sampler import edit_domains
from megatron.errors import CheckpointError, did_you_mean
from megatron.mixing.controller import Controller

_SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class Edits:
    """How the domains of a run differ from those of the checkpoint that it goes on from.

    Attributes:
        before: names in the checkpoint, in its order.
        after: names in the configuration, in its order.
        cursors: where each domain that was ever read stands, those that are gone included.
        parts: for each new domain that is a part of an earlier one, that one's name.
        reweighted: given weights of domains that stay (their shares among themselves) before
            and now, where they differ.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    cursors: Mapping[str, Mapping[str, int]]
    parts: Mapping[str, str]
    reweighted: Mapping[str, tuple[float, float]]

    @property
    def added(self) -> tuple[str, ...]:
        """Domains that the checkpoint does not mix: new ones and returning ones."""
        return tuple(name for name in self.after if name not in self.before)

    @property
    def removed(self) -> tuple[str, ...]:
        """Domains that are not there any more."""
        return tuple(name for name in self.before if name not in self.after)

    def check_allowed(self, *, allowed: bool) -> None:
        """Refuse domains that come or go unless that is wanted.

        Raises:
            CheckpointError: naming them, and the key that allows it.
        """
        if allowed or not (self.added or self.removed):
            return
        told = [f"'{name}' is added{did_you_mean(name, self.removed)}" for name in self.added]
        told += [f"'{name}' is removed" for name in self.removed]
        raise CheckpointError(
            f"the domains are not those of the checkpoint: {', '.join(told)}; give the run the "
            f"same domains, or set allow_domain_edits: true to go on with these"
        )

    def lines(self, *, learns: bool) -> list[str]:
        """Say what happens, a line for each edit.

        Args:
            learns: whether the mixing method moves the weights by what it observes.
        """
        told = [self._told_removed(name) for name in self.removed]
        told += [self._told_added(name) for name in self.added]
        if self.reweighted:
            changes = ", ".join(
                f"{name} {then:.4g} → {now:.4g}" for name, (then, now) in self.reweighted.items()
            )
            effect = (
                "the method keeps the weights that it has learnt, and goes by these from here on"
                if learns
                else "the run draws by them from here on"
            )
            told.append(f"given weights changed: {changes}; {effect}")
        return [f"edit: {line}" for line in told]

    def _told_removed(self, name: str) -> str:
        into = [part for part, whole in self.parts.items() if whole == name]
        if into:
            return f"domain '{name}' is split into {' and '.join(map(repr, into))}"
        return f"domain '{name}' is removed; {self._place(name)} is kept for its return"

    def _told_added(self, name: str) -> str:
        if name in self.cursors:
            return f"domain '{name}' returns, and goes on at {self._place(name)}"
        start = "its samples start at the first"
        if name in self.parts:
            return f"domain '{name}' takes over what was learnt of '{self.parts[name]}'; {start}"
        return f"domain '{name}' is new; {start}"

    def _place(self, name: str) -> str:
        cursor = self.cursors[name]
        return f"sample {cursor['position']} of epoch {cursor['epoch']}"


def find_edits(
    bundle: Mapping[str, Any],
    domains: Mapping[str, DomainConfig],
    weights: npt.NDArray[np.float64],
    given_before: Mapping[str, float] | None,
) -> Edits:
    """Compare the domains of a checkpoint with the configuration's.

    Args:
        bundle: the checkpoint's own state.
        domains: that are trained on, as configured, in the order of ``weights``.
        weights: the given weights now, [K].
        given_before: those of the checkpoint; None if it does not say.

    Raises:
        CheckpointError: ``split_of`` names a domain that the run never had.
    """
    sampler = bundle["planner"]["sampler"]
    cursors = {**sampler.get("retired", {}), **sampler["cursors"]}
    before = tuple(bundle["domains"])
    parts: dict[str, str] = {}
    for name, domain in domains.items():
        if domain.split_of is None or name in cursors:
            continue  # a domain that was there before has a history of its own
        if domain.split_of not in cursors:
            raise CheckpointError(
                f"domains.{name}.split_of is '{domain.split_of}', and the checkpoint knows of no "
                f"such domain{did_you_mean(domain.split_of, cursors)} (it has "
                f"{', '.join(sorted(cursors))})"
            )
        parts[name] = domain.split_of
    return Edits(
        before=before,
        after=tuple(domains),
        cursors=cursors,
        parts=parts,
        reweighted=_reweighted(given_before or {}, dict(zip(domains, weights, strict=True))),
    )


def follow_edits(
    planner: Mapping[str, Any], edits: Edits, controller: Controller
) -> dict[str, Any]:
    """Return the state of the planner for the domains that there are now.

    A step that was decided ahead is decided anew if it speaks of other domains or weights.

    Args:
        planner: its state in the checkpoint.
        edits: what :func:`find_edits` found.
        controller: of this run, newly built.
    """
    changed = edits.before != edits.after or bool(edits.reweighted)
    return {
        **planner,
        "mixer": controller.migrate(planner["mixer"], edits.parts),
        "sampler": edit_domains(planner["sampler"], edits.after),
        "ahead": None if changed else planner["ahead"],
    }


def _reweighted(
    before: Mapping[str, float], now: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    both = [name for name in now if name in before]
    old, new = (sum(weights[name] for name in both) for weights in (before, now))
    if old <= 0 or new <= 0:
        return {}
    shares = {name: (before[name] / old, float(now[name] / new)) for name in both}
    return {name: pair for name, pair in shares.items() if abs(pair[0] - pair[1]) > _SAME}
