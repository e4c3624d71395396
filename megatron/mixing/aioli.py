"""Aioli: probe what each domain does to every loss, then move towards what helps most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.decision import Decision
from megatron.mixing.migrate import Edit, Follow, newcomer, reset, share_of_all
from megatron.mixing.observation import FloatArray, Observation, Signal
from megatron.mixing.options import CommonOptions, by_domain, require
from megatron.mixing.probing import ProbePlan, influence, normalised_influence
from megatron.mixing.simplex import normalise
from megatron.mixing.weights import uniform_weights
from megatron.mixing.window import Window

_STATE_KEYS: Final = ("start", "anew", "round", "last", "exposure", "exposed", "drop", "smoothed")


@dataclass(frozen=True, kw_only=True)
class AioliOptions(CommonOptions):
    """Options of ``aioli``; the defaults are the released ones for two domains.

    Raises:
        ConfigError: a number out of its range, or a prior that nothing uses.
    """

    update_every: int = field(
        default=250,
        metadata={
            "help": "length of a round: probes at its start, then the weights that they gave; "
            "longer than lp_rounds * lp_steps * K",
            "unit": "steps",
        },
    )
    eta: float = field(default=0.2, metadata={"help": "step size of the exponent"})
    lp_rounds: int = field(
        default=4, metadata={"help": "sweeps over all probe mixtures at the start of a round"}
    )
    lp_steps: int = field(
        default=4, metadata={"help": "steps that train on each probe mixture", "unit": "steps"}
    )
    one_hot_factor: float = field(
        default=0.625,
        metadata={
            "help": "share of its own domain in a probe mixture (o); the others share the rest",
            "unit": "probability",
        },
    )
    diagonal: bool = field(
        default=False, metadata={"help": "learn only what each domain does to its own loss"}
    )
    ema: float | None = field(
        default=None,
        metadata={
            "help": "null: the paper's rule, which multiplies the last round's weights; a number: "
            "the released scripts' rule, weights from the running mean of all rounds, in which "
            "the past has this share (they use 0.1 or 0.5)"
        },
    )
    prior: dict[str, float] | list[float] | None = field(
        default=None,
        metadata={
            "help": "restricted mode: the weights that draw the first prior_steps, by name or in "
            "the order of the domains; null = the given weights"
        },
    )
    prior_steps: int = field(
        default=0, metadata={"help": "steps drawn from the prior, before the first round"}
    )
    init: Literal["prior", "uniform"] = field(
        default="prior",
        metadata={
            "help": "the weights that the first round multiplies: the prior, or uniform as in the "
            "released code"
        },
    )
    seed: int = field(
        default=0, metadata={"help": "decides the order of the probes within a sweep"}
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        super().__post_init__()
        require("eta", self.eta, self.eta > 0, "above 0")
        require("lp_rounds", self.lp_rounds, self.lp_rounds >= 1, "at least 1")
        require("lp_steps", self.lp_steps, self.lp_steps >= 1, "at least 1")
        require("ema", self.ema, self.ema is None or 0 <= self.ema < 1, "at least 0 and below 1")
        require("prior_steps", self.prior_steps, self.prior_steps >= 0, "at least 0")
        require("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        if self.prior is not None and not self.prior_steps and self.init == "uniform":
            raise ConfigError(
                "prior is given, but prior_steps is 0 and init is 'uniform', so that nothing "
                "would use it; raise prior_steps, set init: prior, or leave the prior out"
            )


class Aioli(Mixer):
    """Rounds that open with probes, solve for who lowers whose loss, and reweight by that.

    A round is ``update_every`` steps.  It starts with ``lp_rounds`` sweeps, each a
    permutation of the K probe mixtures P_j = o 1_j + (1 - o) / (K - 1) (1 - 1_j), each
    trained for ``lp_steps``; a probe adds V_i(before) - V_i(after) to beta_ij.  Row i of
    A solves P A_i = beta_i / lp_rounds (``diagonal``: A_ii = beta_ii / o alone).
    A is shifted by its least entry if that is negative, and scaled to sum 1.  Then

    * paper (``ema: null``): p_j is multiplied by exp(eta sum_i A_ij);
    * released scripts (``ema: g``): M = (1 - g) A + g M, from M = A, and
      p_j is proportional to exp(eta sum_i M_ij), so that max p / min p <= e^eta.

    i runs over the losses that count for the objective o, those of domains that are never
    trained on among them: A has their rows alone, and in the sums row i is multiplied by o_i
    times their number (1 for the uniform one).  The worst is that of the last measurement.

    Probes are ordinary training.  P above is what really drew them (floors, ceilings and
    skipped steps included), so that beta and P speak of the same steps; where it cannot
    tell the domains apart, as in a shadow run, the weights stay.

    Source: Aioli (arXiv 2411.05735), algorithms 1 and 2.
    """

    method = "aioli"
    has_objective = True
    needs: frozenset[Signal] = frozenset({Signal.VALID_LOSS})
    follows: ClassVar[Mapping[str, Follow]] = {
        "round": reset(-1),
        "last": reset(None),
        "exposure": newcomer(0.0),
        "exposed": newcomer(0.0),
        "drop": newcomer(0.0),
        "smoothed": share_of_all,
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: AioliOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        count = len(self.domains)
        _check_fit(options, count)
        self._check_diagonal(options)
        self._eta, self._ema, self._diagonal = options.eta, options.ema, options.diagonal
        self._timing = options
        self._first = max(options.warmup_steps, options.prior_steps)
        self._plan = self._timetable(self._first)
        self._anew = False
        """Whether the next measurement opens a round, wherever the old timetable was."""
        self._prior_steps = options.prior_steps
        self._prior = self._initial if options.prior is None else self._read_prior(options.prior)
        self._weights = self._prior
        if options.init == "uniform":
            self._weights = self._bounded(uniform_weights(count))
        mixtures = np.full((count, count), (1.0 - options.one_hot_factor) / (count - 1))
        np.fill_diagonal(mixtures, options.one_hot_factor)
        self._mixtures = np.stack([self._bounded(row) for row in mixtures])
        self._round = -1
        self._last: FloatArray | None = None
        self._exposure: FloatArray = np.zeros(count)  # since the last measurement, in steps
        self._exposed: npt.NDArray[np.float64] = np.zeros((count, count))  # [probe, domain]
        self._drop: npt.NDArray[np.float64] = np.zeros((count, len(self.measured)))  # [probe, loss]
        self._smoothed: npt.NDArray[np.float64] | None = None  # [loss, domain]

    def _timetable(self, start: int) -> ProbePlan:
        options = self._timing
        return ProbePlan(
            domains=self.domains,
            start=start,
            every=options.update_every,
            sweeps=options.lp_rounds,
            steps=options.lp_steps,
            seed=options.seed,
        )

    def _read_prior(self, prior: Mapping[str, float] | Sequence[float]) -> FloatArray:
        weights = by_domain("mixing method 'aioli': prior", prior, self.domains, missing=None)
        if (weights < 0).any() or not weights.any():
            raise ConfigError(
                f"mixing method 'aioli': prior is {weights.tolist()}; its weights must be at "
                f"least 0, and one of them above 0"
            )
        return self._bounded(normalise(weights))

    def _decide(self, step: int) -> Decision:
        if step <= self._prior_steps:
            return Decision(sampling_weights=self._prior.copy())
        if self._anew or (self._plan.measures_before(step) and not self._measured_before(step)):
            return Decision(sampling_weights=self._weights.copy(), validate=True)
        probe = self._plan.probe(step)
        if probe is None:
            return Decision(sampling_weights=self._weights.copy())
        return Decision(
            sampling_weights=self._mixtures[probe].copy(),
            fresh_quota=self._plan.steps if self._plan.measures_before(step) else None,
            probe=probe,
        )

    def _follow(self, observation: Observation, sampling_weights: FloatArray) -> None:
        self._exposure = self._exposure + sampling_weights

    def _measure(self, step: int, valid_loss: FloatArray) -> None:
        following = step + 1
        if self._anew and step >= self._first:
            self._plan, self._anew = self._timetable(step), False
        if following <= self._plan.start or not self._plan.measures_before(following):
            return
        current, ended = self._plan.round(following), self._plan.ended_before(following)
        if ended is None:
            self._round = current
            self._exposed, self._drop = np.zeros_like(self._exposed), np.zeros_like(self._drop)
        elif current == self._round and self._last is not None:
            self._count(ended, self._last - valid_loss)
        self._last, self._exposure = valid_loss.copy(), np.zeros(len(self.domains))
        if self._plan.is_over(following) and current == self._round:
            self._learn()

    def _count(self, probe: int, drop: FloatArray) -> None:
        """Add a probe's effect on each loss, [K + M], and what it was trained on."""
        steps = self._plan.steps
        exposure = self._exposure / steps
        if not exposure.any():  # nobody said what drew it: what was asked did
            exposure = self._mixtures[probe]
        self._exposed[probe] += exposure
        self._drop[probe] += np.where(np.isnan(drop), 0.0, drop)

    def _learn(self) -> None:
        counted = self._objective.counted
        solved = np.ones(len(counted), dtype=np.bool_) if self._diagonal else counted
        found = influence(
            self._exposed / self._plan.sweeps,
            self._drop[:, solved] / self._plan.sweeps,
            diagonal=self._diagonal,
        )
        normalised = None if found is None else normalised_influence(found[counted[solved]])
        if normalised is None:
            return
        matrix = np.zeros(self._drop.T.shape)
        matrix[counted] = normalised
        before = self._smoothed
        if self._ema is not None and before is not None:
            matrix = (1.0 - self._ema) * matrix + self._ema * before
        self._smoothed = matrix
        assert self._last is not None  # a round ends with a measurement
        factors = self._objective.factors(self._last)
        if not factors.any():
            return
        score = self._eta * (factors[:, None] * matrix).sum(axis=0)
        history = self._weights if self._ema is None else np.ones(len(score))
        with np.errstate(under="ignore"):
            self._set_weights(history * np.exp(score - score.max()))

    def _update(self, step: int, window: Window) -> FloatArray | None:
        return None

    def _save(self) -> dict[str, Any]:
        return {
            "start": None if self._plan.start == self._first else self._plan.start,
            "anew": self._anew,
            "round": self._round,
            "last": None if self._last is None else self._by_measured(self._last),
            "exposure": self._by_name(self._exposure),
            "exposed": self._rows(self._exposed, self.domains),
            "drop": {
                name: self._by_measured(row)
                for name, row in zip(self.domains, self._drop, strict=True)
            },
            "smoothed": None
            if self._smoothed is None
            else self._rows(self._smoothed, self.measured),
        }

    def _restore(self, rule: Mapping[str, Any]) -> None:
        rule = {"start": None, "anew": False, **rule}  # older states knew of no edits
        self._check_rule(rule, _STATE_KEYS)
        start = self._first
        if rule["start"] is not None:
            start = self._whole(rule["start"], "start", least=0)
        last, smoothed = rule["last"], rule["smoothed"]
        read = (
            self._whole(rule["round"], "round", least=-1),
            None if last is None else self._measured_vector(last, "last"),
            self._vector(rule["exposure"], "exposure"),
            self._matrix(rule["exposed"], "exposed"),
            self._drops(rule["drop"]),
            None if smoothed is None else self._influences(smoothed),
        )
        self._round, self._last, self._exposure, self._exposed, self._drop, self._smoothed = read
        self._plan, self._anew = self._timetable(start), bool(rule["anew"])

    def _edited(self, state: dict[str, Any], edit: Edit) -> dict[str, Any]:
        """Open a round with the next step, in which the new domains are probed as the old are."""
        rule = dict(state["rule"])
        if state["step"] >= self._first:
            rule["anew"] = True
            # What was measured last is measured again, in the domains that there are now.
            state = {**state, "measured_step": max(state["measured_step"] - 1, -1)}
        return {**state, "rule": rule}

    def _rows(
        self, matrix: npt.NDArray[np.float64], names: Sequence[str]
    ) -> dict[str, dict[str, float | None]]:
        return {name: self._by_name(row) for name, row in zip(names, matrix, strict=True)}

    def _drops(self, rows: Any) -> npt.NDArray[np.float64]:
        """Read [probe, loss]; a target that is new fell by nothing."""
        if not isinstance(rows, Mapping) or rows.keys() != set(self.domains):
            raise self._damaged("drop", rows)
        matrix = np.stack([self._measured_vector(rows[name], "drop") for name in self.domains])
        if not np.isfinite(matrix[:, : len(self.domains)]).all():
            raise self._damaged("drop", rows)
        return np.nan_to_num(matrix, nan=0.0)

    def _influences(self, rows: Any) -> npt.NDArray[np.float64]:
        """Read [loss, domain]; nothing is known of a target that is new."""
        if not isinstance(rows, Mapping):
            raise self._damaged("smoothed", rows)
        own = {name: row for name, row in rows.items() if name in self.domains}
        nothing = dict.fromkeys(self.domains, 0.0)
        others = [
            self._vector(rows.get(name, nothing), "smoothed") for name in self._context.targets
        ]
        return np.vstack([self._matrix(own, "smoothed"), *others])

    def _matrix(self, rows: Any, name: str) -> npt.NDArray[np.float64]:
        if not isinstance(rows, Mapping) or rows.keys() != set(self.domains):
            raise self._damaged(name, rows)
        matrix = np.stack([self._vector(rows[domain], name) for domain in self.domains])
        if not np.isfinite(matrix).all():
            raise self._damaged(name, rows)
        return matrix

    def _estimates(self) -> dict[str, Any]:
        if self._smoothed is None:
            return {"round": self._round}
        return {
            "round": self._round,
            "influence": self._by_name(self._smoothed.sum(axis=0)),
            "influence_on": self._rows(self._smoothed, self.measured),
        }

    def _check_diagonal(self, options: AioliOptions) -> None:
        """Refuse to learn own effects alone for losses that have no domain of their own."""
        counted = self._objective.fixed
        if not options.diagonal or counted is None or counted[: len(self.domains)].any():
            return
        raise ConfigError(
            f"mixing method 'aioli': diagonal learns what each domain does to its own loss, and "
            f"the objective counts only {', '.join(self._context.targets)}, never trained on; "
            f"set diagonal: false"
        )


def _check_fit(options: AioliOptions, count: int) -> None:
    """Refuse what cannot work with this number of domains."""
    if count < 2:
        raise ConfigError(
            "mixing method 'aioli': there is one domain and nothing to compare it with; give at "
            "least two, or use the method static"
        )
    probing = options.lp_rounds * options.lp_steps * count
    if probing >= options.update_every:
        raise ConfigError(
            f"mixing method 'aioli': update_every is {options.update_every}, but probing takes "
            f"lp_rounds * lp_steps * domains = {options.lp_rounds} * {options.lp_steps} * {count} "
            f"= {probing} steps of each round; raise update_every to at least {probing + 1}, or "
            f"lower lp_rounds or lp_steps"
        )
    share = options.one_hot_factor
    if not 1.0 / count < share <= 1.0:
        raise ConfigError(
            f"mixing method 'aioli': one_hot_factor is {share!r}; with {count} domains it must be "
            f"above 1/{count} (at which all probes are alike) and at most 1"
        )
