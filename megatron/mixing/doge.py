"""DoGE: weights by how well each domain's gradient points where the held-out gradient does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Literal

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.base import RunContext
from megatron.mixing.decision import Decision
from megatron.mixing.gradient_aim import GradientAim
from megatron.mixing.migrate import Follow, newcomer
from megatron.mixing.multiplicative import logarithms, multiply
from megatron.mixing.observation import BoolArray, FloatArray, Observation, Signal
from megatron.mixing.options import CommonOptions, require
from megatron.mixing.reweighting import Reweighter
from megatron.mixing.simplex import normalise, saturate, softmax
from megatron.mixing.window import Window

_POOL_KEYS: Final = frozenset({"alignment", "steps", "rate", "rates"})
_AHEAD_KEYS: Final = frozenset({"step", "log_weights", "pool", "moved", "counts"})
_STATE_KEYS: Final = frozenset({"log_weights", "total", "count", "pool", "ahead"})


@dataclass(frozen=True, kw_only=True)
class DogeOptions(CommonOptions):
    """Options of ``doge``.

    Raises:
        ConfigError: a number out of its range.
    """

    mu: float = field(
        default=0.01,
        metadata={
            "help": "strength of the pull towards the weights of the step before: the log weights "
            "move by the clipped learning rate times the alignment, over mu (0.05 in the "
            "original)"
        },
    )
    smoothing: float = field(
        default=0.0,
        metadata={"help": "share of the uniform distribution in the domain weights (c)"},
    )
    target: Literal["validation", "all"] = field(
        default="validation",
        metadata={
            "help": "what a domain's gradient should agree with: that of held-out data, weighted "
            "by the objective, or those of all other domains in the batch (generalisation to "
            "all)"
        },
    )
    clip: float = field(
        default=5.0,
        metadata={
            "help": "greatest alignment that counts; the least is 0: a domain that points the "
            "other way loses nothing"
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require("mu", self.mu, self.mu > 0, "above 0")
        require("smoothing", self.smoothing, 0 <= self.smoothing <= 1, "between 0 and 1")
        require("clip", self.clip, self.clip > 0, "above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """Alignments since the last update: sums over the steps that had the domain, [K]."""

    alignment: FloatArray
    steps: FloatArray
    rate: float
    rates: int

    @classmethod
    def empty(cls, domains: int) -> _Pool:
        return cls(alignment=np.zeros(domains), steps=np.zeros(domains), rate=0.0, rates=0)

    def add(self, alignment: FloatArray, present: BoolArray, rate: float) -> _Pool:
        with np.errstate(over="ignore"):
            total = saturate(self.alignment + np.where(present, alignment, 0.0))
        return _Pool(
            alignment=total,
            steps=self.steps + present,
            rate=self.rate + rate,
            rates=self.rates + 1,
        )

    @property
    def mean(self) -> FloatArray:
        return self.alignment / np.maximum(self.steps, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ahead:
    """What a step's own gradients make of the state, once that step counts."""

    step: int
    log_weights: FloatArray
    pool: _Pool
    moved: bool
    counts: FloatArray | None


class Doge(Reweighter):
    """The proxy stage: each domain's loss is weighed by how much its gradient helps.

    At each step, before it trains, the alignments a_i = <g_i, g_v> / mean_j |g_j| are
    measured, with g_i the gradient of domain i's mean loss and g_v that of the held-out
    loss (or of all other domains' losses); every gradient is clipped first, and that of
    a domain that is absent is 0.  With the learning rate lr of the step,
    log w_i <- log w_i + clip(lr a_i, 0, 5 lr) / mu;  w <- (1 - c) softmax(log w) + c / K.
    The step's update direction is sum_i w_i g_i, over the sum of w_i of the domains that
    are present: a token of domain i weighs w_i / n_i in the loss, n_i being the domain's
    tokens in this very batch.  The samples are drawn by the given weights.

    With ``update_every`` above 1 the alignments of the steps between are averaged, each
    domain's over the steps that had it; with ``pool: false`` only the update's own step is
    measured, and costs its backward passes.

    :meth:`result` is the mean of w over all updates.

    Source: DoGE (arXiv 2310.15393), algorithm 1, with the normalisation and the clipping
    of its released code.
    """

    method = "doge"
    has_objective = True
    follows: ClassVar[Mapping[str, Follow]] = {**Reweighter.follows, "pool": newcomer(0.0)}
    needs = frozenset({Signal.GRADIENT_ALIGNMENT, Signal.LEARNING_RATE})

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: DogeOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._rule = options
        self._log_weights = logarithms(self._uniform())
        self._pooled = _Pool.empty(len(self.domains))
        self._ahead: _Ahead | None = None
        self._aim = self._checked_aim()

    @property
    def gradient_aim(self) -> GradientAim:
        """What the gradients of the domains are to be compared with."""
        return self._aim

    def _checked_aim(self) -> GradientAim:
        weights, others = self._objective.fixed, self._rule.target == "all"
        if weights is None:
            raise ConfigError(
                "mixing method 'doge': objective is 'worst', which changes with every loss, and "
                "the gradient that domains are compared with is of fixed weights; give the "
                "objective weights, or leave it out"
            )
        unseen = [name for name in self._context.targets if weights[self.measured.index(name)] > 0]
        if others and unseen:
            raise ConfigError(
                f"mixing method 'doge': target is 'all', which compares the domains of a batch "
                f"with each other, and the objective names {', '.join(unseen)}, which is never "
                f"in one; set target to 'validation', or take it out of the objective"
            )
        return GradientAim(others=others, weights=weights)

    def _decide(self, step: int) -> Decision:
        ahead = self._ahead if self._ahead is not None and self._ahead.step == step else None
        decision = Decision(
            sampling_weights=self._weights.copy(), loss_weights=self._loss_weights(ahead)
        )
        if ahead is not None or self._foreseen(step):
            return decision
        # Between updates only the counts of the batch are wanted, which cost nothing.
        costless = frozenset({Signal.LEARNING_RATE})
        return replace(decision, measure=self.needs if self._feeds(step) else costless)

    def _feeds(self, step: int) -> bool:
        """Whether the gradients of a step move the weights, at once or later."""
        return self._options.pool or step % self._options.update_every == 0

    def _loss_weights(self, ahead: _Ahead | None) -> FloatArray:
        """Return w_i / n_i, scaled to sum 1, [K]; n_i as expected where it is not known."""
        log_weights = self._log_weights if ahead is None else ahead.log_weights
        counts = self._weights if ahead is None or ahead.counts is None else ahead.counts
        present = (counts > 0) & self._support
        if not present.any():
            present, counts = self._support, self._weights
        ratio = np.zeros(len(counts))
        with np.errstate(over="ignore"):
            ratio[present] = self._domain_weights(log_weights)[present] / counts[present]
        if not (ratio.any() and np.isfinite(ratio).all()):  # beyond what a float can say
            ratio[present] = softmax(log_weights[present] - np.log(counts[present]))
        return normalise(ratio)

    def _foresee(self, observation: Observation) -> None:
        self._ahead = self._seen(observation)

    def _follow(self, observation: Observation, sampling_weights: FloatArray) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.step != observation.step:
            # A loop that measures while it trains tells of it afterwards.
            ahead = self._seen(observation)
        self._log_weights, self._pooled = ahead.log_weights, ahead.pool
        if ahead.moved:
            self._mean.add(self._domain_weights(self._log_weights))

    def _seen(self, observation: Observation) -> _Ahead:
        """Return what a step's gradients make of the state."""
        step, log_weights, pool, moved = observation.step, self._log_weights, self._pooled, False
        counts = observation.vector("token_count")
        counts = observation.vector("sample_count") if counts is None else counts
        alignment, rate = observation.vector("gradient_alignment"), observation.learning_rate
        if alignment is not None and rate is not None and self._feeds(step):
            present = np.ones(len(alignment), dtype=bool) if counts is None else counts > 0
            pool = pool.add(alignment, present, rate)
        if pool.rates and step % self._options.update_every == 0:
            gain = self._gain(pool)
            smoothing = self._rule.smoothing
            log_weights = multiply(log_weights, gain, smoothing=smoothing, support=self._support)
            pool, moved = _Pool.empty(len(self.domains)), True
        return _Ahead(step=step, log_weights=log_weights, pool=pool, moved=moved, counts=counts)

    def _gain(self, pool: _Pool) -> FloatArray:
        """Return clip(lr a, 0, clip lr) / mu, [K]."""
        rate = pool.rate / pool.rates
        with np.errstate(over="ignore", under="ignore"):
            return saturate(rate * np.clip(pool.mean, 0.0, self._rule.clip) / self._rule.mu)

    def _update(self, step: int, window: Window) -> FloatArray | None:
        return None

    def _save(self) -> dict[str, Any]:
        ahead = self._ahead
        return {
            **self._save_weights(),
            "pool": self._save_pool(self._pooled),
            "ahead": ahead
            and {
                "step": ahead.step,
                "log_weights": self._by_name(ahead.log_weights),
                "pool": self._save_pool(ahead.pool),
                "moved": ahead.moved,
                "counts": None if ahead.counts is None else self._by_name(ahead.counts),
            },
        }

    def _save_pool(self, pool: _Pool) -> dict[str, Any]:
        return {
            "alignment": self._by_name(pool.alignment),
            "steps": self._by_name(pool.steps),
            "rate": pool.rate,
            "rates": pool.rates,
        }

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        weights, pool = self._read_weights(rule), self._read_pool(rule["pool"])
        ahead = None
        if rule["ahead"] is not None:
            block = self._block(rule["ahead"], "ahead", _AHEAD_KEYS)
            counts = block["counts"]
            ahead = _Ahead(
                step=self._whole(block["step"], "step", least=1),
                log_weights=self._finite(block["log_weights"], "log_weights"),
                pool=self._read_pool(block["pool"]),
                moved=bool(block["moved"]),
                counts=None if counts is None else self._finite(counts, "counts"),
            )
        self._take_weights(weights)
        self._pooled, self._ahead = pool, ahead

    def _read_pool(self, values: object) -> _Pool:
        block = self._block(values, "pool", _POOL_KEYS)
        rate = block["rate"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not np.isfinite(rate):
            raise self._damaged("rate", rate)
        return _Pool(
            alignment=self._finite(block["alignment"], "alignment"),
            steps=self._finite(block["steps"], "steps"),
            rate=float(rate),
            rates=self._whole(block["rates"], "rates", least=0),
        )

    def _estimates(self) -> dict[str, Any]:
        return {"domain_weights": self._by_name(self._domain_weights(self._log_weights))}
