"""Whether all ranks still hold the same controller.

Every rank decides for itself what the next step trains on; that they decide alike rests on
their having seen the same numbers.  A rank whose memory or software is at fault would train on
other samples in silence, so the ranks compare a short hash of their state now and then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.errors import RunError


class DesyncError(RunError):
    """Ranks hold different mixing or data states."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Compares the state of all ranks; collective.

    Attributes:
        gather: returns every rank's value of the argument, in the order of the ranks.
        state: the state that has to be the same everywhere (JSON-able).
        interval: steps between two comparisons; 0 = none but the one before a save.
    """

    gather: Callable[[str], list[str]]
    state: Callable[[], Mapping[str, Any]]
    interval: int

    def after_step(self, step: int) -> None:
        """Compare if a comparison is due after ``step``."""
        if self.interval and step % self.interval == 0:
            self.compare(step)

    def compare(self, step: int) -> None:
        """Compare now.

        Raises:
            DesyncError: naming the ranks that differ from the rest, on every rank.
        """
        hashes = self.gather(_digest(self.state()))
        if len(set(hashes)) > 1:
            raise DesyncError(_describe(hashes, step))


def _digest(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _describe(hashes: list[str], step: int) -> str:
    held: dict[str, list[int]] = {}
    for rank, value in enumerate(hashes):
        held.setdefault(value, []).append(rank)
    groups = sorted(held.values(), key=len, reverse=True)
    said = "; ".join(f"{_ranks(group)}: {hashes[group[0]]}" for group in groups)
    clear = len(groups[0]) > len(groups[1])
    strangers = sorted(rank for group in groups[1:] for rank in group)
    who = f"{_ranks(strangers)} {'differs' if len(strangers) == 1 else 'differ'} from the rest"
    return (
        f"after step {step} the ranks no longer hold the same mixing and data state: "
        f"{who if clear else 'no state has a majority'} ({said}); nothing was saved from it: look "
        "at the memory and the software of those nodes, then run again from the last checkpoint"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
