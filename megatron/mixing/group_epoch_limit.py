"""A limit on passes where domains are in groups: over a group's data, and over a domain's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.decision import RunContext
from megatron.mixing.epoch_limit import EpochLimit
from megatron.mixing.grouping import Levels
from megatron.mixing.observation import FloatArray, Observation


class GroupEpochLimit(EpochLimit):
    """Limits that name groups hold for the groups' data, those that name domains for theirs.

    One number for all is for groups.  What a limit takes from a domain, the others of its
    group get while they have room, then the other groups.

    Args:
        limit: one number for all groups, or a mapping by names of groups and domains; None
            = no limit, forecasts alone.
        levels: the groups, and the ceilings of both levels.
        context: sizes of the data and length of the run, where they are known.

    Raises:
        ConfigError: as :class:`~megatron.mixing.epoch_limit.EpochLimit` has it.
    """

    def __init__(
        self,
        limit: float | Mapping[str, float] | None,
        *,
        levels: Levels,
        context: RunContext,
    ) -> None:
        grouping, sizes = levels.grouping, context.samples_per_epoch
        of_groups: float | Mapping[str, float] | None = limit
        of_domains: Mapping[str, float] | None = None
        if isinstance(limit, Mapping):
            groups, domains = grouping.sort("max_epochs", limit)
            of_groups, of_domains = groups or None, domains or None
        self._levels = levels
        super().__init__(
            of_domains, domains=grouping.domains, ceiling=levels.ceiling, context=context
        )
        if sizes is not None:
            sizes = tuple(grouping.total(np.array(sizes, dtype=np.float64)).tolist())
        self._groups = EpochLimit(
            of_groups,
            domains=grouping.groups,
            ceiling=levels.group_ceiling,
            context=replace(context, samples_per_epoch=sizes),
        )
        if limit is not None and self._ceilings()[0].sum() < 1.0 - 1e-9:
            raise ConfigError(
                "max_epochs of the groups and of the domains inside them (with the ceilings) "
                "allow less data together than the run draws; raise some"
            )

    def observe(self, observation: Observation, drawn_by: FloatArray) -> None:
        """See :class:`~megatron.mixing.epoch_limit.EpochLimit`."""
        super().observe(observation, drawn_by)
        self._tell_groups()

    def _tell_groups(self) -> None:
        """Let the groups have drawn what their domains have."""
        total = self._levels.grouping.total(self._drawn)
        drawn = dict(zip(self._levels.grouping.groups, total.tolist(), strict=True))
        self._groups.load_state_dict({"step": self._step, "drawn": drawn})

    def _ceilings(self) -> tuple[FloatArray, FloatArray]:
        """Return the greatest weights of the groups, [G], and of the domains, [K]."""
        levels, most, own = self._levels, self.most(), self._groups.most()
        ceiling = levels.ceiling if most is None else np.minimum(levels.ceiling, most)
        group = levels.group_ceiling if own is None else np.minimum(levels.group_ceiling, own)
        return np.minimum(group, levels.grouping.total(ceiling)), ceiling

    def apply(self, weights: FloatArray) -> FloatArray:
        """See :class:`~megatron.mixing.epoch_limit.EpochLimit`; both levels' limits hold."""
        if self.most() is None and self._groups.most() is None:
            return weights
        grouping = self._levels.grouping
        group, ceiling = self._ceilings()
        if (weights <= ceiling).all() and (grouping.total(weights) <= group + 1e-15).all():
            return weights
        total = group.sum()
        if total <= 0:
            return weights
        if total < 1.0:  # by the rounding of a draw to whole samples
            group, ceiling = group / total, ceiling / total
        return Levels(
            grouping=grouping,
            group_floor=np.zeros(len(group)),
            group_ceiling=group,
            floor=np.zeros(len(ceiling)),
            ceiling=ceiling,
        ).bounded(weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`~megatron.mixing.epoch_limit.EpochLimit`."""
        super().load_state_dict(state)
        self._tell_groups()
