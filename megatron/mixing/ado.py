"""ADO: fit how each domain's loss falls, sample where it would fall fastest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.migrate import Follow, newcomer, share
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.options import CommonOptions, require
from megatron.mixing.power_law import NOT_FOUND, PowerLaw, fit_power_laws
from megatron.mixing.repetition import effective_data, marginal_value
from megatron.mixing.simplex import is_distribution, normalise
from megatron.mixing.smoothing import SmoothedHistory
from megatron.mixing.window import Window

LEAST_ALPHA: Final = 0.05
LEAST_SHARE: Final = 0.01
_VECTORS: Final = ("credit", "average", "last", "held_sum", "held_tokens", "seen")
_STATE_KEYS: Final = (*_VECTORS, "seen_in_all", "laws", "next_fit", "losses", "data")


@dataclass(frozen=True, kw_only=True)
class AdoOptions(CommonOptions):
    """Options of ``ado``; the defaults are the paper's.

    Raises:
        ConfigError: a number out of its range.
    """

    first_fit: int = field(
        default=1000,
        metadata={
            "help": "the step after which the laws are fitted first; until then the given weights "
            "draw (the paper takes token shares: weights: natural)",
            "unit": "steps",
        },
    )
    fit_every: int = field(
        default=1000, metadata={"help": "distance of the fits after that", "unit": "steps"}
    )
    count: Literal["all", "own"] = field(
        default="all",
        metadata={
            "help": "the data that a law counts: samples seen in all domains, as released, or in "
            "its own domain"
        },
    )
    credit: Literal["paper", "released"] = field(
        default="paper",
        metadata={
            "help": "what a domain's recent share h of the batches counts for: h^0.5, or "
            "(h (1 - h))^0.5 as released"
        },
    )
    r_star: float | None = field(
        default=None,
        metadata={
            "help": "discount of repeated data: a sample read r times over counts e^(-r / r_star) "
            "of a fresh one, in n and in the slope (15.4 in arXiv 2305.16264); null = as a fresh "
            "one",
            "unit": "repetitions",
        },
    )
    least_epsilon: float = field(
        default=0.0,
        metadata={
            "help": "least irreducible loss of a law; the released code's e^0.5 shuts out domains "
            "of low entropy",
            "unit": "nats per token",
        },
    )
    smoothing_window: int = field(
        default=101,
        metadata={"help": "window of the filter that smooths the losses, odd", "unit": "steps"},
    )
    smoothing_order: int = field(default=3, metadata={"help": "order of the filter's polynomial"})
    subsample: int = field(
        default=10, metadata={"help": "a law is fitted to one loss in so many", "unit": "steps"}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("first_fit", "fit_every", "subsample"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        window, order = self.smoothing_window, self.smoothing_order
        require("smoothing_window", window, window >= 1 and window % 2 == 1, "odd and at least 1")
        require(
            "smoothing_order", order, 0 <= order < window, "at least 0 and below smoothing_window"
        )
        star = self.r_star
        require("r_star", star, star is None or star > 0, "above 0, or null")
        epsilon = self.least_epsilon
        require("least_epsilon", epsilon, epsilon >= 0, "at least 0")


class Ado(Mixer):
    """Sampling by how fast each domain's fitted law says that its loss falls.

    L_k(n) = eps_k + beta_k n^(-alpha_k) is fitted to each domain's smoothed training
    losses.  With mu the given weights and h a running share of the batches,

        s_k = max(alpha_k, 0.05) (L_k(n) - eps_k) / n,
        rho proportional to mu_k h_k^0.5 s_k, raised to at least min(0.01, 1 / (2 K)),
        p = 0.9 q + 0.1 rho, then q <- q + (rho - q) / (t + 1), h <- 0.9 h + 0.1 share,

    q and h starting at mu.  p = mu until every domain with a share has a law.  n counts
    samples where they are known (tokens otherwise).  Under an objective o the right side of
    rho is multiplied by o_k, the worst domain being that of the last training losses.  With
    ``r_star`` n counts effective data D' of each domain (own, or added over all), and s_k is
    multiplied by dD'/dD, what the domain's next sample is worth (see ``repetition``).

    Source: ADO (arXiv 2410.11820), section 3 and its released code.
    """

    method = "ado"
    has_objective = True
    follows: ClassVar[Mapping[str, Follow]] = {
        "credit": share,
        "average": share,
        "last": newcomer(None),
        "held_sum": newcomer(0.0),
        "held_tokens": newcomer(0.0),
        "seen": newcomer(0.0),
        "laws": newcomer(None),
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: AdoOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        count = len(self.domains)
        self._objective.check_trained(self.method)
        self._unique = self._read_unique(options)
        self._ado = options
        self._mu = normalise(weights)
        self._credit, self._average = self._mu, self._mu
        self._last: FloatArray = np.full(count, np.nan)
        self._held_sum: FloatArray = np.zeros(count)
        self._held_tokens: FloatArray = np.zeros(count)
        self._seen: FloatArray = np.zeros(count)
        self._seen_in_all = 0.0  # in domains that an edit has taken out, too
        self._laws: list[PowerLaw] = [NOT_FOUND] * count
        self._next_fit = options.first_fit
        self._losses, self._data = self._histories()

    def _read_unique(self, options: AdoOptions) -> FloatArray | None:
        """Return the samples of each domain where repetition is discounted, [K]."""
        if options.r_star is None:
            return None
        sizes = self._context.samples_per_epoch
        if sizes is None or self._context.samples_per_step is None:
            raise ConfigError(
                "mixing method 'ado': r_star is given, but the samples of each domain and of a "
                "step are not known; give samples_per_epoch and samples_per_step in the "
                "RunContext, or leave r_star out"
            )
        return np.maximum(np.array(sizes, dtype=np.float64), 1.0)

    def _histories(self) -> tuple[SmoothedHistory, SmoothedHistory]:
        every = self._ado.subsample
        losses = SmoothedHistory(
            window=self._ado.smoothing_window, order=self._ado.smoothing_order, every=every
        )
        return losses, SmoothedHistory(window=1, order=0, every=every)

    def _follow(self, observation: Observation, sampling_weights: FloatArray) -> None:
        sums, tokens = observation.vector("loss_sum"), observation.vector("token_count")
        if sums is None or tokens is None:
            return
        tokens_of_all = float(tokens.sum())
        self._credit = 0.9 * self._credit + 0.1 * tokens / tokens_of_all
        samples = self._samples(observation, tokens)
        self._seen, self._seen_in_all = self._seen + samples, self._seen_in_all + samples.sum()
        present = tokens > 0
        with np.errstate(over="ignore"):
            self._held_sum = self._held_sum + np.where(present, sums, 0.0)
        self._held_tokens = self._held_tokens + tokens
        enough = (self._held_tokens > 0) & (self._held_tokens >= self._options.min_tokens)
        mean = self._held_sum / np.where(enough, self._held_tokens, 1.0)
        self._last = np.where(enough & np.isfinite(mean), mean, self._last)
        self._held_sum = np.where(enough, 0.0, self._held_sum)
        self._held_tokens = np.where(enough, 0.0, self._held_tokens)
        self._losses.append(self._last)
        self._data.append(self._amount())
        if observation.step >= self._next_fit:
            self._fit()
            past = observation.step - self._ado.first_fit
            every = self._ado.fit_every
            self._next_fit = self._ado.first_fit + (past // every + 1) * every

    def _samples(self, observation: Observation, tokens: FloatArray) -> FloatArray:
        """Return the step's samples of each domain, [K]; its tokens where nobody counts samples."""
        given = observation.vector("sample_count")
        if given is not None:
            return given
        samples = self._context.samples_per_step
        return tokens if samples is None else samples * (tokens / tokens.sum())

    def _amount(self) -> FloatArray:
        """Return n of each law, [K]."""
        own, all_ = self._seen, self._seen_in_all
        if self._unique is not None and self._ado.r_star is not None:
            own = effective_data(self._seen, self._unique, self._ado.r_star)
            all_ = all_ - float(self._seen.sum()) + float(own.sum())
        return own if self._ado.count == "own" else np.full(len(self.domains), all_)

    def _fit(self) -> None:
        losses, data = self._losses.values(), self._data.values()
        self._laws = fit_power_laws(data, losses, least_epsilon=self._ado.least_epsilon)

    def _update(self, step: int, window: Window) -> FloatArray | None:
        share = self._preference()
        if share is None:
            return None
        p = 0.9 * self._average + 0.1 * share
        self._average = self._average + (share - self._average) / (step + 1)
        return p

    def _preference(self) -> FloatArray | None:
        """Return rho, [K]; None while it is not known."""
        epsilon, beta, alpha = self._parameters()
        known = np.isfinite(epsilon)
        n = self._amount()
        if not known.any() or not (known | (self._mu == 0)).all():
            return None
        h = self._credit if self._ado.credit == "paper" else self._credit * (1.0 - self._credit)
        with np.errstate(all="ignore"):
            speed = np.maximum(alpha, LEAST_ALPHA) * beta * n**-alpha / n
            raw = self._mu * np.sqrt(np.maximum(h, 0.0)) * speed
            raw = raw * self._factors() * self._worth()
        raw = np.where(known & (n > 0), raw, 0.0)
        if not np.isfinite(raw).all() or not raw.any():
            return None
        least = min(LEAST_SHARE, 1.0 / (2.0 * len(raw)))
        return normalise(np.maximum(normalise(raw), least))

    def _worth(self) -> FloatArray:
        """Return what the next sample of each domain is worth, [K]: 1 = a fresh one."""
        if self._unique is None or self._ado.r_star is None:
            return np.ones(len(self.domains))
        return marginal_value(self._seen, self._unique, self._ado.r_star)

    def _factors(self) -> FloatArray:
        """Return what the objective makes of each domain, [K]."""
        unseen = np.full(len(self._context.targets), np.nan)
        return self._objective.factors(np.append(self._last, unseen))[: len(self.domains)]

    def _parameters(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return epsilon, beta and alpha, each [K]; NaN = no law yet."""
        table = np.array([[law.epsilon, law.beta, law.alpha] for law in self._laws])
        return table[:, 0], table[:, 1], table[:, 2]

    def _save(self) -> dict[str, Any]:
        epsilon, beta, alpha = map(self._by_name, self._parameters())
        vectors = {name: self._by_name(getattr(self, f"_{name}")) for name in _VECTORS}
        return {
            **vectors,
            "seen_in_all": float(self._seen_in_all),
            "laws": {"epsilon": epsilon, "beta": beta, "alpha": alpha},
            "next_fit": self._next_fit,
            "losses": self._losses.state_dict(self.domains),
            "data": self._data.state_dict(self.domains),
        }

    def _restore(self, rule: Mapping[str, Any]) -> None:
        if "seen_in_all" not in rule and "seen" in rule:  # older states knew of no edits
            rule = {**rule, "seen_in_all": math.fsum(rule["seen"].values())}
        self._check_rule(rule, _STATE_KEYS)
        vectors = {name: self._vector(rule[name], name) for name in _VECTORS}
        for name in ("credit", "average"):
            if not is_distribution(normalise_sum(vectors[name])):
                raise self._damaged(name, rule[name])
        losses, data = self._histories()
        try:
            table = [self._vector(rule["laws"][key], key) for key in ("epsilon", "beta", "alpha")]
            losses.load_state_dict(rule["losses"], self.domains)
            data.load_state_dict(rule["data"], self.domains)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged("laws or histories", str(error)) from error
        if not isinstance(rule["seen_in_all"], float):
            raise self._damaged("seen_in_all", rule["seen_in_all"])
        next_fit = self._whole(rule["next_fit"], "next_fit", least=1)
        self._laws = [
            PowerLaw(epsilon=float(e), beta=float(b), alpha=float(a))
            for e, b, a in zip(*table, strict=True)
        ]
        for name, vector in vectors.items():
            setattr(self, f"_{name}", vector)
        self._losses, self._data, self._next_fit = losses, data, next_fit
        self._seen_in_all = rule["seen_in_all"]

    def _reweighted(self, before: FloatArray) -> None:
        if not self._shifted:  # q is still the given weights
            self._average = self._mu

    def _estimates(self) -> dict[str, Any]:
        if not any(law.finite for law in self._laws):
            return {}
        epsilon, beta, alpha = map(self._by_name, self._parameters())
        return {"epsilon": epsilon, "beta": beta, "alpha": alpha}


def normalise_sum(values: FloatArray) -> FloatArray:
    """Return values / sum, so that rounding of a long recursion is no damage."""
    total = values.sum()
    return values / total if np.isfinite(total) and total > 0 else values
