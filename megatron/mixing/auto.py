"""The project's own rule: sample where loss still falls, and where it still can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.migrate import Follow, newcomer
from megatron.mixing.observation import BoolArray, FloatArray
from megatron.mixing.options import CommonOptions, by_domain, require
from megatron.mixing.simplex import normalise
from megatron.mixing.trend import Trend
from megatron.mixing.window import Window

PASSED: Final = 0.02
"""Nats below its count loss at which a domain is taken to have more to it than counts."""


@dataclass(frozen=True, kw_only=True)
class AutoOptions(CommonOptions):
    """Options of ``auto``.

    Raises:
        ConfigError: a number out of its range.
    """

    count_losses: dict[str, float] | list[float] | None = field(
        default=None,
        metadata={
            "help": "the loss that a table of counts reaches on each domain: a mapping that names "
            "every domain, or a list in their order; null = counted on the run's own training "
            "data before the first update",
            "unit": "nats per token",
        },
    )
    count_tokens: int = field(
        default=1_000_000,
        metadata={
            "help": "most tokens of a domain that are counted; never more than the run would "
            "train on by the given weights",
            "unit": "tokens",
        },
    )
    keep: float = field(
        default=0.15,
        metadata={"help": "share of the given weights in the distribution"},
    )
    least_exponent: float = field(
        default=0.1,
        metadata={"help": "a domain is expected to fall at least as this power of its data"},
    )
    greatest_exponent: float = field(
        default=2.0,
        metadata={"help": "and at most as this power"},
    )
    memory: float = field(
        default=3.0,
        metadata={
            "help": "how fast old losses fade from the slope: by this many per cent when a domain "
            "gets one per cent of new data"
        },
    )
    first_update: int = field(
        default=10,
        metadata={"help": "the first step after which the weights may change", "unit": "steps"},
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require("count_tokens", self.count_tokens, self.count_tokens >= 1, "at least 1")
        require("keep", self.keep, 0 <= self.keep <= 1, "between 0 and 1")
        least, greatest = self.least_exponent, self.greatest_exponent
        require("least_exponent", least, 0 <= least <= greatest, "from 0 to greatest_exponent")
        require("greatest_exponent", greatest, 0 < greatest < np.inf, "above 0")
        require("memory", self.memory, 1 <= self.memory < np.inf, "at least 1")
        require("first_update", self.first_update, self.first_update >= 1, "at least 1")


class Auto(Mixer):
    """Sampling by what more data of a domain will gain at the end of the run, as far as is known.

    With s_k the slope of domain k's training loss in the logarithm of its own tokens
    (:class:`~megatron.mixing.trend.Trend`), L_k its level, c_k its count loss and mu the given
    weights,

        e_k = max(L_k - c_k, 0),
        alpha_k = s_k / e_k, brought into [a, b]   (a: least_exponent, b: greatest_exponent),
        g_k = alpha_k e_k exp(-alpha_k h),   h = ln(steps of the run / steps done),
        p = (1 - keep) normalise(mu g) + keep mu.

    Where a loss falls towards c as e n^-alpha, its slope is alpha e: so s_k tells alpha, and a
    and b say what can be believed of it.  g_k is what the slope will be at the end of the run
    if the shares stay: a domain that will be learnt by then anyway gets less early on, and one
    that is far from its end more.  At equal slopes at the end no sample would be better spent
    elsewhere.  Noise has e = 0 as soon as its frequencies are learnt; a plateau has e > 0 and
    is not taken for an end.

    A domain that is more than 0.02 nats below its count loss has more to it than counts can
    tell: such domains share alike, each with the mean of their slopes (by mu; a rise counts as
    0), carried to the end as if alpha were a.  Once all are there, p = mu: nothing is known
    against the given weights.  Nor is anything known of a domain that has not been seen yet: it
    has the mean g of the others.  Under an objective o, mu g is multiplied by o_k.  Where the
    length of the run is not known, it is taken to be half done.

    The count loss is what a table of the tokens seen after the last few predicts of unseen
    text; it is counted once, on the domains' own training data, and costs no pass of the model.

    Source: this project (``docs/mixbench.md`` has its measurements); the law is ADO's
    (arXiv 2410.11820), with the asymptote known before and not fitted.
    """

    method = "auto"
    has_objective = True
    follows: ClassVar[Mapping[str, Follow]] = {
        "trend": newcomer(0.0),
        "count_losses": newcomer(None),
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: AutoOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._auto = options
        self._objective.check_trained(self.method)
        self._told: FloatArray | None = None
        if options.count_losses is not None:
            where = "mixing method 'auto': count_losses"
            self._told = by_domain(where, options.count_losses, self.domains, missing=None)
            for name, loss in zip(self.domains, self._told, strict=True):
                require(f"{where}: '{name}'", float(loss), loss >= 0, "at least 0")
        elif context.count_losses is None:
            raise ConfigError(
                "mixing method 'auto': the training data are not at hand to be counted; give "
                "count_losses (what megatron/data/count_model.py says of each domain), or a "
                "RunContext with count_losses"
            )
        self._counted = self._told
        self._trend = Trend.empty(len(self.domains))

    def _update(self, step: int, window: Window) -> FloatArray | None:
        self._trend = self._trend.add(window.mean_loss, window.token_count, self._auto.memory)
        known = self._trend.known
        seen = np.where(known, self._given, 0.0)
        if step < self._auto.first_update or not seen.any():
            return None
        gain = self._gain(step) * self._factors()
        # Of what has not been seen nothing is known: it keeps its part of the given weights.
        wanted = self._given * np.where(known, gain, float(seen @ gain) / float(seen.sum()))
        if not np.isfinite(wanted).all() or not wanted.any():
            return None
        keep = self._auto.keep
        return (1.0 - keep) * normalise(wanted) + keep * self._given

    def _gain(self, step: int) -> FloatArray:
        """Return g after ``step``, [K]."""
        slope, excess = self._trend.slope, self._excess()
        ends, ahead = np.maximum(excess, 0.0), self._ahead(step)
        low, high = self._auto.least_exponent, self._auto.greatest_exponent
        now = np.clip(slope, low * ends, high * ends)
        exponent = np.where(ends > 0, now / np.where(ends > 0, ends, 1.0), 0.0)
        gain = now * np.exp(-exponent * ahead)
        passed = self._passed(excess)
        share = self._given * passed
        if share.any():
            pooled = float(share @ np.maximum(slope, 0.0)) / float(share.sum())
            gain = np.where(passed, pooled * np.exp(-low * ahead), gain)
            if not gain.any():  # nobody learns, or the slopes are all noise
                gain = passed.astype(np.float64)
        return gain

    def _ahead(self, step: int) -> float:
        """Return h: the e-folds that each domain's data will still grow by, if shares stay."""
        total = self._context.total_steps
        return float(np.log(max(1.0, total / max(1, step)) if total is not None else 2.0))

    def _excess(self) -> FloatArray:
        """Return how far each domain is above its count loss, [K]; below 0 if it is below."""
        if self._counted is None:
            self._counted = self._count()
        return np.where(self._trend.known, self._trend.level - self._counted, 0.0)

    def _passed(self, excess: FloatArray) -> BoolArray:
        return np.asarray(excess < -PASSED)

    def _count(self) -> FloatArray:
        """Return the count losses of the run's data, [K]."""
        assert self._context.count_losses is not None
        most = np.full(len(self.domains), float(self._auto.count_tokens))
        steps, tokens = self._context.total_steps, self._context.tokens_per_step
        if steps is not None and tokens is not None:
            most = np.minimum(most, steps * tokens * self._given)
        losses = np.asarray(self._context.count_losses(most), dtype=np.float64)
        if losses.shape != most.shape or not (np.isfinite(losses) & (losses >= 0)).all():
            raise ConfigError(
                f"mixing method 'auto': the context's count_losses returned {losses.tolist()}; it "
                f"must return a finite loss of at least 0 for each of {', '.join(self.domains)}"
            )
        return losses

    def _factors(self) -> FloatArray:
        """Return what the objective makes of each domain, [K]."""
        unseen = np.full(len(self._context.targets), np.nan)
        return self._objective.factors(np.append(self._trend.level, unseen))[: len(self.domains)]

    def _estimates(self) -> dict[str, Any]:
        shown = {
            "level": self._by_name(self._trend.level),
            "slope": self._by_name(self._trend.slope),
        }
        if self._counted is None:
            return shown
        counted = {"count_loss": self._by_name(self._counted)}
        return shown | counted | {"gain": self._by_name(self._gain(self._step))}

    def _save(self) -> dict[str, Any]:
        counted = np.full(len(self.domains), np.nan) if self._counted is None else self._counted
        return {
            "trend": self._trend.state_dict(self._by_name),
            "count_losses": self._by_name(counted),
        }

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, ("trend", "count_losses"))
        counted = self._vector(rule["count_losses"], "count_losses")
        try:
            trend = Trend.from_state(rule["trend"], lambda one: self._vector(one, "trend"))
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged("trend", rule["trend"]) from error
        self._trend = trend
        # What a configuration says now is newer than what was counted then.
        if self._told is None:
            self._counted = None if np.isnan(counted).any() else counted
