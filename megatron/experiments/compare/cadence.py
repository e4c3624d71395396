"""What a run will spend beside its training, known before it starts.

The controller that the run would build is driven over the run's steps with made-up losses: when
a method validates, probes or measures ahead hangs on its timetable, and hardly on what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.config import Config, resolve_batch
from megatron.errors import ConfigError
from megatron.experiments.flops import Charges, Spent, charge, spent_by_ledger
from megatron.experiments.study import ranks_of
from megatron.mixing.base import Decision, Mixer, Observation, Signal
from megatron.mixing.controller import Controller
from megatron.model.accounting import training_flops
from megatron.registry import mixing_methods
from megatron.training.check import build_controller
from megatron.training.domains import OpenDomains, start_weights
from megatron.training.layout import run_layout
from megatron.training.summary import complete
from megatron.training.token_costs import TokenCosts, foresight_tokens

KINDS: Final = ("validation", "probes", "reference", "foresight")
_LOSS: Final = 3.0
"""Nats per token; any loss does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cadence:
    """What a run of N steps spends, step by step.

    Attributes:
        config: of the run, complete.
        tokens: of a step.
        extra: tokens of each kind that the first n steps cost beside training, by kind [N + 1].
        gradients: whether what is measured ahead are gradients.
        reviewed: tokens of report validations by the end of each step that steer the run [N + 1].
    """

    config: Config
    tokens: int
    extra: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]]
    gradients: bool
    reviewed: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def steps(self) -> int:
        """N."""
        return len(self.reviewed) - 1

    @property
    def step_flops(self) -> float:
        """FLOPs of training for one step."""
        return training_flops(self.config.model, self.tokens)

    def spent(self, steps: int) -> Spent:
        """Return what the first steps spend."""
        extra = {kind: float(total[steps]) for kind, total in self.extra.items()}
        extra["validation"] += float(self.reviewed[steps])
        return spent_by_ledger(steps * self.tokens, extra, foresight_trains=self.gradients)

    def charges(self, steps: int) -> Charges:
        """Return what the first steps cost."""
        return charge(self.config.model, self.spent(steps))

    def affordable(self, budget: float) -> int:
        """Return the most steps, N at most, that a budget of FLOPs pays for; 0: none."""
        low, high = 0, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.charges(middle).total <= budget * (1 + 1e-12)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def cadence(config: Config, domains: OpenDomains, *, gpus: int) -> Cadence:
    """Drive a run's controller over all its steps.

    Args:
        config: of the run; a reference model that it will have need not be there yet.
        domains: its data, opened.
        gpus: CUDA devices of a machine that it starts on.

    Raises:
        ConfigError: the method's options are wrong.
    """
    curriculum = config.data.curriculum_learning
    if curriculum is not None and curriculum.enabled:
        raise ConfigError(
            "curriculum_learning: methods are compared at steps of equally many tokens; "
            "leave it out"
        )
    config = complete(config, domains)
    micro, _, total = resolve_batch(
        config.batch, run_layout(config, ranks_of(config, gpus)).data_size
    )
    weights = start_weights(config.mixing, config.domains, domains)
    mixer = build_controller(config, domains, weights, micro=micro, total=total)
    tokens = total * config.model.context_length
    costs = TokenCosts(
        seq_length=config.model.context_length,
        validation=_windows(domains, config.mixing.validation_samples)
        * config.model.context_length,
        reference=_runs_reference(config, mixer),
        foresight=foresight_tokens(mixer, tokens),
    )
    steps = config.training.train_iters
    extra = {kind: np.zeros(steps + 1, dtype=np.int64) for kind in KINDS}
    driver = _Driver(mixer, len(domains.targets), total, config.mixing.lag)
    for step in range(1, steps + 1):
        for kind, more in driver.step(step, costs, tokens).items():
            extra[kind][step] = more
    return Cadence(
        config=config,
        tokens=tokens,
        extra={kind: np.cumsum(values) for kind, values in extra.items()},
        gradients=Signal.GRADIENT_ALIGNMENT in mixer.needs,
        reviewed=reviewed_tokens(config, domains, total),
    )


def reviewed_tokens(
    config: Config, domains: OpenDomains, total: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens of report validations that steer a run, after each step [N + 1].

    A report costs a method nothing, unless it or its guardrail acts on it.

    Args:
        config: of the run.
        domains: its data.
        total: samples of a global batch.
    """
    training = config.training
    counts = np.zeros(training.train_iters + 1, dtype=np.int64)
    if acts_on_reports(config):
        counts[:: training.eval_interval] = 1
        counts[-1] = 1
    windows = _windows(domains, training.validation_samples(total))
    return np.cumsum(counts) * windows * config.model.context_length


def acts_on_reports(config: Config) -> bool:
    """Tell whether a run's method, or its guardrail, reads the report validations."""
    build: Any = mixing_methods[config.mixing.method].build
    own = getattr(build, "review", Mixer.review) is not Mixer.review
    return own or config.mixing.options.get("guardrail") is not None


def _windows(domains: OpenDomains, samples: int) -> int:
    """Return the windows of a validation of all domains."""
    return sum(min(samples, part.num_windows(0)) for part in domains.valid if part is not None)


def _runs_reference(config: Config, mixer: Controller) -> bool:
    """Tell whether a reference model runs beside; a store of losses costs no passes."""
    return Signal.EXCESS_LOSS in mixer.needs and not config.mixing.options.get("reference_losses")


class _Driver:
    """Answers a controller as a training loop would, with the same loss for everything."""

    def __init__(self, mixer: Controller, targets: int, samples: int, lag: int) -> None:
        self._mixer = mixer
        self._lag = lag
        self._ahead: tuple[Decision, bool] | None = None
        self._targets = targets
        self._samples = samples
        self._seen = np.zeros(len(mixer.domains))

    def step(self, step: int, costs: TokenCosts, tokens: int) -> dict[str, int]:
        decision, validated = self._ahead or self._decide(step)
        weights = decision.sampling_weights
        counts = weights * self._samples
        self._seen = self._seen + counts
        fields = self._fields(counts, tokens / self._samples)
        trained = Observation(step, sampling_weights=weights, **fields)
        if decision.measure:
            self._mixer.foresee(trained)
        # With a lag, the next step is decided before this one is observed.
        self._ahead = self._decide(step + 1) if self._lag else None
        self._mixer.observe(trained)
        return costs.price(decision, trained=tokens, validated=validated, foreseen=decision.measure)

    def _decide(self, step: int) -> tuple[Decision, bool]:
        """Return a step's decision, and whether there was a validation for it."""
        decision = self._mixer.decide(step)
        if not decision.validate:
            return decision, False
        self._mixer.observe(self._validation(step - 1))
        return self._mixer.decide(step), True

    def _validation(self, step: int) -> Observation:
        count = len(self._mixer.domains)
        return Observation(
            step,
            loss_sum=np.zeros(count),
            token_count=np.zeros(count),
            valid_loss=np.full(count, _LOSS),
            target_loss=np.full(self._targets, _LOSS) if self._targets else None,
        )

    def _fields(self, counts: np.ndarray[Any, Any], length: float) -> dict[str, Any]:
        """Return what a loop could tell of a step; a method takes what it reads."""
        ones = np.ones(len(counts))
        return {
            "loss_sum": counts * length * _LOSS,
            "token_count": counts * length,
            "batch_valid_loss": ones * _LOSS,
            "excess_loss": ones * 0.1,
            "reference_loss": ones * (_LOSS - 0.1),
            "gradient_alignment": ones * 0.1,
            "loss_square_sum": counts * _LOSS**2,
            "sample_count": counts,
            "samples_seen": self._seen,
            "learning_rate": 1e-3,
        }
