"""How long every run of a method is, so that all of it costs what it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.experiments.compare.cadence import Cadence, cadence
from megatron.experiments.compare.study_parts import Budget
from megatron.experiments.flops import Charges
from megatron.training.domains import OpenDomains

_ROOM: Final = 1 + 1e-12
"""A budget of n steps is n steps, whatever the division is rounded to."""

Priced = Callable[[int], Cadence]
"""Returns the cadence of a run that is to have so many steps."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """Runs of one role in a method's chain.

    Attributes:
        role: ``final`` for the run that counts; what comes before it has other names.
        count: runs of it.
        steps: of each.
        charges: planned, of each.
    """

    role: str
    count: int
    steps: int
    charges: Charges


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """What a method does with the budget of a task, for one seed.

    Attributes:
        search: what comes before the run that counts, in order.
        final: the run that counts.
        budget: FLOPs that it may spend in all.
    """

    search: tuple[Leg, ...]
    final: Leg
    budget: float

    @property
    def charges(self) -> Charges:
        """The whole bill: the final run's, with all other runs on it."""
        return whole_bill(self.final.charges, [(leg.role, leg.charges) for leg in self.legs_each])

    @property
    def legs_each(self) -> list[Leg]:
        """One entry per run before the one that counts."""
        return [leg for leg in self.search for _ in range(leg.count)]

    def leg(self, role: str) -> Leg:
        """Return a leg by its role."""
        return next(leg for leg in (*self.search, self.final) if leg.role == role)


@dataclass(frozen=True, kw_only=True)
class LegSpec:
    """Runs of one role before their length is known.

    Attributes:
        role: see :class:`Leg`.
        count: runs of it.
        priced: their cadence.
    """

    role: str
    count: int
    priced: Priced


REFERENCE: Final = "reference"


def whole_bill(final: Charges, others: Sequence[tuple[str, Charges]]) -> Charges:
    """Return the bill of a run with those on it without which it could not have been.

    Args:
        final: of the run alone.
        others: role and bill of every other run.
    """
    return Charges(
        training=final.training,
        validation=final.validation,
        reference=final.reference,
        foresight=final.foresight,
        proxies=sum(one.total for role, one in others if role != REFERENCE),
        references=sum(one.total for role, one in others if role == REFERENCE),
        probes=final.probes,
    )


def pricing(config_for: Callable[[int], Config], domains: OpenDomains, gpus: int) -> Priced:
    """Return what prices runs, each length once.

    Args:
        config_for: returns the configuration of a run of so many steps.
        domains: the data.
        gpus: see :func:`megatron.experiments.compare.cadence.cadence`.
    """
    known: dict[int, Cadence] = {}

    def priced(steps: int) -> Cadence:
        if steps not in known:
            known[steps] = cadence(config_for(steps), domains, gpus=gpus)
        return known[steps]

    return priced


def plan_method(
    search: Sequence[LegSpec],
    final: Priced,
    *,
    steps: int,
    budget: float,
    rule: Budget,
    share: float,
) -> MethodPlan:
    """Divide a task's budget among the runs of a method.

    Runs before the one that counts are all of one length.

    Args:
        search: those runs.
        final: prices the run that counts.
        steps: of the baseline's run.
        budget: what the baseline's run costs, FLOPs.
        rule: of the study.
        share: of the budget that goes into ``search`` under ``equal``.

    Raises:
        ConfigError: it does not pay for one step of each run.
    """
    equal = rule.setting == "equal"
    allowance = budget * (share if equal else rule.extra)
    longest = steps if rule.setting == "unrestricted" else None
    legs = _search_legs(search, allowance, steps, longest)
    spent = sum(leg.count * leg.charges.total for leg in legs)
    length = steps
    if equal:
        # Without anything but training it could be so long.
        most = int((budget - spent) * _ROOM / final(steps).step_flops)
        length = _affordable(lambda n: final(n).affordable(budget - spent), most)
    if length < 1:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs, of which {spent:.3g} go to runs before "
            f"the one that counts, does not pay for one step of it; raise train_iters"
        )
    bill = final(length).charges(length)
    return MethodPlan(
        search=tuple(legs),
        final=Leg(role="final", count=1, steps=length, charges=bill),
        budget=budget if equal else budget * (1 + rule.extra),
    )


def _search_legs(
    search: Sequence[LegSpec], allowance: float, steps: int, longest: int | None
) -> list[Leg]:
    if not search:
        return []

    def pays_for(n: int) -> int:
        plans = [(spec.count, spec.priced(n)) for spec in search]
        low, high = 0, n
        while low < high:
            middle = (low + high + 1) // 2
            cost = sum(count * plan.charges(middle).total for count, plan in plans)
            low, high = (middle, high) if cost <= allowance * _ROOM else (low, middle - 1)
        return low

    count = sum(spec.count for spec in search)
    a_step = sum(spec.count * spec.priced(steps).step_flops for spec in search)
    most = int(allowance * _ROOM / a_step)
    length = _affordable(pays_for, most if longest is None else min(most, longest))
    if length < 1:
        raise ConfigError(
            f"{allowance:.3g} FLOPs do not pay for one step of each of the {count} runs "
            f"before the one that counts; raise share or train_iters, or lower points"
        )
    return [
        Leg(
            role=spec.role,
            count=spec.count,
            steps=length,
            charges=spec.priced(length).charges(length),
        )
        for spec in search
    ]


def _affordable(pays_for: Callable[[int], int], most: int) -> int:
    """Return the length that pays for itself: a run of n steps may have another timetable.

    Args:
        pays_for: the most steps, up to n, that are paid for if a run is to have n.
        most: the greatest length.
    """
    n = most
    while n >= 1 and (less := pays_for(n)) != n:
        n = less
    return n
