"""Passes over each domain: how many a run will have made, and a limit that holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.decision import RunContext
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.reading import by_domain, require
from megatron.mixing.simplex import normalise, project

_SLACK: Final = 1e-9
_KEYS: Final = ("step", "drawn")


class EpochLimit:
    """Keeps count of what has been drawn; forecasts and limits passes over the data.

    If a mixture p holds to the end of a run of T steps of B samples, domain k will have been
    read (drawn_k + p_k B (T - t)) / U_k times after the t steps so far.  A limit E_k on that
    is a ceiling on p_k:

        c_k = (E_k U_k - drawn_k) / (B (T - t)).

    Whoever keeps to the ceilings never lowers them (c_k stays where p_k = c_k and rises where
    p_k < c_k), so what can be kept at the first step can be kept at every one.

    Args:
        limit: E, one number for all domains or a mapping by name (others without one);
            None = no limit, forecasts alone.
        domains: names.
        ceiling: the user's ceilings, [K].
        context: sizes of the data and length of the run, where they are known.

    Raises:
        ConfigError: the limits allow less data than the run draws, name an unknown domain
            or are not above 0, or sizes that they need are not known.
    """

    def __init__(
        self,
        limit: float | Mapping[str, float] | None,
        *,
        domains: Sequence[str],
        ceiling: FloatArray,
        context: RunContext,
    ) -> None:
        self._domains, self._context = tuple(domains), context
        self._ceiling = ceiling
        self._drawn: FloatArray = np.zeros(len(domains))
        self._step = 0
        unique = context.samples_per_epoch
        self._unique = None if unique is None else np.array(unique, dtype=np.float64)
        if self._unique is not None and len(self._unique) != len(domains):
            raise ConfigError(
                f"samples_per_epoch has {len(self._unique)} values for {len(domains)} domains"
            )
        self._allowed: FloatArray | None = None
        if limit is not None:
            self._allowed = self._read(limit)
            self._check()

    def _read(self, limit: float | Mapping[str, float]) -> FloatArray:
        """Return the samples that may be drawn of each domain in all, [K]."""
        unknown = [
            name
            for name, value in (
                ("the samples of each domain (samples_per_epoch)", self._unique),
                ("the samples of a step (samples_per_step)", self._context.samples_per_step),
                ("the steps of the run (total_steps)", self._context.total_steps),
            )
            if value is None
        ]
        if unknown or self._unique is None:
            raise ConfigError(
                f"max_epochs is {limit!r}, but {' and '.join(unknown)} are not known; give them "
                f"in the RunContext, or leave max_epochs out"
            )
        epochs = np.full(len(self._domains), np.inf)
        if isinstance(limit, Mapping):
            read = by_domain("max_epochs", limit, self._domains, missing=0.0)
            for k, name in enumerate(self._domains):
                if name in limit:
                    require(f"max_epochs of domain '{name}'", limit[name], read[k] > 0, "above 0")
                    epochs[k] = read[k]
        else:
            require("max_epochs", limit, limit > 0, "above 0")
            epochs[:] = limit
        with np.errstate(over="ignore"):  # a limit that is no limit
            return np.where(np.isfinite(epochs), epochs * self._unique, np.inf)

    def _check(self) -> None:
        """Refuse limits that the run would have to break."""
        assert self._allowed is not None
        assert self._unique is not None
        total = self._total()
        within = np.minimum(self._allowed, self._ceiling * total)
        if within.sum() >= total * (1.0 - _SLACK):
            return
        allowed, short = float(within.sum()), total - float(within.sum())
        least = total / float(self._unique.sum())
        text = (
            f"max_epochs allows {allowed:,.0f} samples in all and the run draws {total:,.0f}: "
            f"{short:,.0f} too few"
        )
        if (self._ceiling < 1).any():
            raise ConfigError(f"{text} (with the ceilings); raise max_epochs or the ceilings")
        steps = int(allowed // (self._context.samples_per_step or 1))
        raise ConfigError(
            f"{text}; raise it (one number for all domains must be at least {least:.3g}), or "
            f"train for {steps} steps at most"
        )

    def _total(self) -> float:
        return float((self._context.total_steps or 0) * (self._context.samples_per_step or 0))

    def _left(self) -> float | None:
        """Return the samples that the run has yet to draw; None if that is not known."""
        if not self._context.total_steps or not self._context.samples_per_step:
            return None
        return float((self._context.total_steps - self._step) * self._context.samples_per_step)

    def observe(self, observation: Observation, drawn_by: FloatArray) -> None:
        """Count what a step drew: as told, else its samples, else what was asked for.

        Args:
            observation: a step with tokens.
            drawn_by: the distribution that drew it, [K].
        """
        told, counts = observation.vector("samples_seen"), observation.vector("sample_count")
        if told is not None:
            self._drawn = told
        elif counts is not None:
            self._drawn = self._drawn + counts
        else:
            self._drawn = self._drawn + drawn_by * (self._context.samples_per_step or 0)
        self._step = observation.step

    def most(self) -> FloatArray | None:
        """Return the greatest weights that keep to the limits, [K]; None where none is set."""
        left = self._left()
        if self._allowed is None or left is None or left <= 0:
            return None
        return np.asarray(np.maximum(self._allowed - self._drawn, 0.0) / left)

    def apply(self, weights: FloatArray) -> FloatArray:
        """Return the nearest distribution that keeps to the limits; the same bits if it does.

        Nearest means that what the limits take from some domains is shared equally by those
        that have room for it, so no other domain falls below its floor.  The limits are hard:
        a floor above one gives way.
        """
        most = self.most()
        if most is None:
            return weights
        ceiling = np.minimum(self._ceiling, most)
        if (weights <= ceiling).all():
            return weights
        if ceiling.sum() < 1.0:  # by the rounding of a draw to whole samples
            ceiling = np.minimum(most, 1.0)
        if ceiling.sum() <= 1.0:
            return normalise(ceiling) if ceiling.any() else weights
        return project(weights, np.zeros(len(weights)), ceiling)

    def forecast(self, weights: FloatArray) -> FloatArray | None:
        """Return the passes over each domain at the end of the run if ``weights`` hold, [K]."""
        left = self._left()
        if self._unique is None or left is None:
            return None
        drawn = self._drawn + weights * max(left, 0.0)
        return np.asarray(drawn / self._sizes(), dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, by name."""
        drawn = map(float, self._drawn)
        return {"step": self._step, "drawn": dict(zip(self._domains, drawn, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counts; a domain that they do not name has drawn nothing.

        Raises:
            CheckpointError: they are damaged.
            ConfigError: with what has been drawn, the limits allow less than the rest of the
                run draws (they or the run's length have changed since).
        """
        try:
            if state.keys() != set(_KEYS):
                raise KeyError(*state)
            step, drawn = int(state["step"]), state["drawn"]
            read = np.array([float(drawn.get(name, 0.0)) for name in self._domains])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the count of drawn samples is damaged: {state!r}") from error
        if step < 0 or not np.isfinite(read).all() or (read < 0).any():
            raise CheckpointError(f"the count of drawn samples is damaged: {state!r}")
        self._step, self._drawn = step, read
        self._check_rest()

    def _check_rest(self) -> None:
        """Refuse limits that what has been drawn already makes the run break."""
        left = self._left()
        if self._allowed is None or left is None or left <= 0:
            return
        within = np.minimum(np.maximum(self._allowed - self._drawn, 0.0), self._ceiling * left)
        short = left - float(within.sum())
        # Whole samples, and random draws, may stray from the weights by less than a step's.
        if short > (self._context.samples_per_step or 0):
            over = [
                f"{name} {drawn / unique:.3g}"
                for name, drawn, unique in zip(
                    self._domains, self._drawn, self._sizes(), strict=True
                )
            ]
            raise ConfigError(
                f"max_epochs allows {short:,.0f} samples less than the rest of the run draws: "
                f"{self._step} steps have made these passes: {', '.join(over)}; raise it, or "
                f"shorten the run"
            )

    def _sizes(self) -> FloatArray:
        sizes = np.ones(len(self._domains)) if self._unique is None else self._unique
        return np.maximum(sizes, 1.0)
