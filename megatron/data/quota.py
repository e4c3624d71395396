"""The memory of the apportionment: carries between steps, and blocks closed in themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.apportion import Counts, Floats, apportion, largest_carry, sound_carry
from megatron.state import check_state


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """A block of steps that is apportioned as one.

    Totals per domain come from one apportionment of all its units by largest remainder; they
    are then handed out step by step by the carry rule with shares totals/units.  Under that
    rule carries stay above −1, and at the block's end they are whole numbers that sum to zero:
    so they are zero, and the totals are met exactly.

    Attributes:
        left: steps still to come.
        weights: [K] the weights for which the totals were made.
        units: units per step for which they were made.
        carry: [K] asked minus given since the block began.
        totals: [K] units to hand out since the totals were made.
        steps: steps over which.
        done: steps since.
        given: [K] units handed out since.
    """

    left: int
    weights: Floats
    units: int
    carry: Floats
    totals: Counts
    steps: int
    done: int
    given: Counts


class Quota:
    """Counts per domain, step by step, with the bounds of :mod:`megatron.data.apportion`."""

    def __init__(self, domains: int) -> None:
        """Start with nothing owed to any of ``domains`` domains."""
        self.carry: Floats = np.zeros(domains)
        self._block: _Block | None = None

    def snapshot(self) -> tuple[Floats, _Block | None]:
        """Return the state by reference; nothing in it is ever changed in place."""
        return self.carry, self._block

    def restore(self, snapshot: tuple[Floats, _Block | None]) -> None:
        """Go back to a :meth:`snapshot`."""
        self.carry, self._block = snapshot

    @property
    def in_block(self) -> bool:
        """Whether steps of a block are still to come."""
        return self._block is not None

    def draw(
        self,
        weights: Floats,
        units: int,
        *,
        capacity: Counts | None,
        ties: NDArray[np.uint64],
        fresh_quota: int | None = None,
    ) -> Counts:
        """Return the [K] counts of a step, which sum to ``units``, and remember what is owed.

        Args:
            weights: [K] sampling weights, sum 1.
            units: units in this step.
            capacity: [K] the most units each domain can still give; ``None`` for no limit.
            ties: [K] random numbers that decide between equals.
            fresh_quota: forget what is owed and make this and the following steps, so many in
                all, a block: over it each domain gets within one unit of weights × units ×
                steps, by largest remainder.  Afterwards nothing is owed.  If the weights
                change inside a block, the rest of it is apportioned anew, so that the total
                follows what was asked.

        Raises:
            ExhaustedError: see :func:`~megatron.data.apportion.apportion`.
        """
        if fresh_quota is not None:
            nothing = np.zeros(weights.size)
            self._block = _plan_block(fresh_quota, nothing, weights, units, capacity, ties)
            self.carry = nothing
        if self._block is None:
            counts, self.carry = apportion(
                self.carry + weights * units, weights, units, capacity, ties
            )
            return counts
        return self._draw_from_block(self._block, weights, units, capacity, ties)

    def _draw_from_block(
        self,
        block: _Block,
        weights: Floats,
        units: int,
        capacity: Counts | None,
        ties: NDArray[np.uint64],
    ) -> Counts:
        if block.units != units or not np.array_equal(block.weights, weights):
            block = _plan_block(block.left, block.carry, weights, units, capacity, ties)
        done = block.done + 1
        if done == block.steps:
            counts = block.totals - block.given
        else:
            owed = block.totals * done / block.steps - block.given
            counts = np.zeros(weights.size, dtype=np.int64)
            places = np.flatnonzero(block.totals)
            counts[places] = largest_carry(owed[places], units, ties[places])
        block = replace(
            block,
            left=block.left - 1,
            carry=block.carry + weights * units - counts,
            done=done,
            given=block.given + counts,
        )
        self._block = block if block.left else None
        return counts

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the state, JSON-able, arrays keyed by domain name."""

        def named(array: NDArray[Any]) -> dict[str, Any]:
            return dict(zip(names, array.tolist(), strict=True))

        block = self._block and {
            field: named(value) if isinstance(value, np.ndarray) else value
            for field, value in vars(self._block).items()
        }
        return {"version": 1, "carry": named(self.carry), "block": block}

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take up a state; domains may come in another order.

        Raises:
            CheckpointError: keys are missing or unknown.
        """
        check_state("the apportionment", state, version=1, keys=("carry", "block"))

        def ordered(values: Mapping[str, Any], dtype: type[Any]) -> NDArray[Any]:
            return np.array([values[name] for name in names], dtype=dtype)

        self.carry = ordered(state["carry"], np.float64)
        block = state["block"]
        self._block = block and _Block(
            left=block["left"],
            weights=ordered(block["weights"], np.float64),
            units=block["units"],
            carry=ordered(block["carry"], np.float64),
            totals=ordered(block["totals"], np.int64),
            steps=block["steps"],
            done=block["done"],
            given=ordered(block["given"], np.int64),
        )


def follow_edit(state: Mapping[str, Any], carries: Mapping[str, float]) -> dict[str, Any]:
    """Return the state of an apportionment whose domains are those of ``carries`` from now on.

    A block in progress is closed.  What is owed is kept as far as the bounds of
    :mod:`megatron.data.apportion` allow, so that they hold from here on as from the start.

    Args:
        state: what :meth:`Quota.state_dict` gave.
        carries: what each domain is owed, by name (:func:`owed_by_name` tells it of those that
            are in the state); of any sum.
    """
    check_state("the apportionment", state, version=1, keys=("carry", "block"))
    sound = sound_carry(np.array(list(carries.values()), dtype=np.float64))
    return {**state, "carry": dict(zip(carries, sound.tolist(), strict=True)), "block": None}


def owed_by_name(state: Mapping[str, Any]) -> dict[str, float]:
    """Return what each domain in a state is owed, within a block in progress too."""
    check_state("the apportionment", state, version=1, keys=("carry", "block"))
    return dict((state["block"] or state)["carry"])


def _plan_block(
    left: int,
    carry: Floats,
    weights: Floats,
    units: int,
    capacity: Counts | None,
    ties: NDArray[np.uint64],
) -> _Block:
    owed = carry + weights * (units * left)
    totals, _ = apportion(owed, weights, units * left, capacity, ties)
    return _Block(
        left=left,
        weights=weights.copy(),
        units=units,
        carry=carry.copy(),
        totals=totals,
        steps=left,
        done=0,
        given=np.zeros(weights.size, dtype=np.int64),
    )
