"""DoReMi: weights by how far each domain is from what a reference model makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.base import RunContext
from megatron.mixing.decision import Decision
from megatron.mixing.migrate import Edit
from megatron.mixing.multiplicative import logarithms, multiply
from megatron.mixing.observation import FloatArray, Observation, Signal
from megatron.mixing.options import CommonOptions, require
from megatron.mixing.reweighting import Reweighter
from megatron.mixing.simplex import normalise, saturate
from megatron.mixing.window import Window

_STATE_KEYS: Final = frozenset({"log_weights", "total", "count", "score", "ahead"})
_AHEAD_KEYS: Final = frozenset({"step", "log_weights", "score", "drawn_by"})


@dataclass(frozen=True, kw_only=True)
class DoremiOptions(CommonOptions):
    """Options of ``doremi``; a run needs ``reference`` or ``reference_losses``.

    They say where the run finds what it tells the method of; another training loop, which
    compares losses itself, may leave both out.

    Raises:
        ConfigError: both kinds of reference, or a number out of its range.
    """

    reference: str | None = field(
        default=None,
        metadata={
            "help": "the run whose frozen model is the reference: its folder, or one of its "
            "checkpoints"
        },
    )
    reference_losses: str | None = field(
        default=None,
        metadata={
            "help": "a store of the reference's loss of every token, in place of its model: the "
            "folder that tools/score_data.py wrote"
        },
    )
    eta: float = field(
        default=1.0, metadata={"help": "step size of the exponent", "unit": "1 / nat"}
    )
    smoothing: float = field(
        default=1e-4,
        metadata={
            "help": "share of the uniform distribution in the domain weights (c); the released "
            "code's, 1e-3 in the paper"
        },
    )
    start: Literal["given", "uniform"] = field(
        default="given",
        metadata={
            "help": "the first domain weights: the given weights, which also draw the samples "
            "(released), or uniform (paper)"
        },
    )
    excess: Literal["token", "domain"] = field(
        default="token",
        metadata={
            "help": "what is cut off at 0: every token's loss above the reference's, or the mean "
            "of the domain"
        },
    )
    loss_lag: Literal[0, 1] = field(
        default=1,
        metadata={
            "help": "1: the domain weights of a step come from the losses of the steps before, "
            "under any layout; 0: from its own losses, which takes one more forward pass over "
            "the batch (not with pipeline stages)",
            "unit": "steps",
        },
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        super().__post_init__()
        if self.reference is not None and self.reference_losses is not None:
            raise ConfigError("reference and reference_losses exclude each other; give one of them")
        require("eta", self.eta, self.eta > 0, "above 0")
        require("smoothing", self.smoothing, 0 <= self.smoothing <= 1, "between 0 and 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ahead:
    """What a step's own losses make of log alpha and the scores, once that step counts."""

    step: int
    log_weights: FloatArray
    score: FloatArray
    drawn_by: FloatArray


class Doremi(Reweighter):
    """The proxy stage: domains are drawn by r, and their losses weighed by alpha / r.

    With the score lambda_i = mean over the tokens of domain i of max(loss - reference
    loss, 0), over the whole global batch: log alpha_i <- log alpha_i + eta lambda_i;
    alpha <- (1 - c) softmax(log alpha) + c / K.  A domain that was not seen keeps its
    score; before it is first seen that is ln(vocabulary size), what a model that knows
    nothing loses.  A token of domain i weighs alpha_i / r_i in the loss, r being the given
    weights.

    :meth:`result` is the mean of all alpha, the first included: the mixture for the run
    that comes after.

    Source: DoReMi (arXiv 2305.10429), algorithm 1, with the timing, the start and the
    smoothing of its released code as options.
    """

    method = "doremi"
    needs = frozenset({Signal.LOSS, Signal.EXCESS_LOSS})

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: DoremiOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        if context.vocab_size is None or context.vocab_size < 1:
            raise ConfigError(
                "mixing method 'doremi': the score of a domain that has not been seen is "
                "ln(vocabulary size), and that is not known; give context=RunContext(vocab_size=…)"
            )
        self._rule = options
        self._unseen = math.log(context.vocab_size)
        self._score = np.full(len(self.domains), self._unseen)
        if options.start == "uniform":
            self._log_weights = logarithms(self._uniform())
        self._mean.add(self._domain_weights(self._log_weights))
        self._ahead: _Ahead | None = None

    def _decide(self, step: int) -> Decision:
        ahead = self._ahead if self._ahead is not None and self._ahead.step == step else None
        alpha = self._domain_weights(self._log_weights if ahead is None else ahead.log_weights)
        drawn_by = self._weights if ahead is None else ahead.drawn_by
        counted = self._support & (drawn_by > 0)
        with np.errstate(over="ignore"):
            ratio = saturate(np.where(counted, alpha / np.where(counted, drawn_by, 1.0), 0.0))
        decision = Decision(
            sampling_weights=self._weights.copy(),
            loss_weights=normalise(ratio) if ratio.any() else None,
        )
        due = self._rule.loss_lag == 0 and step % self._options.update_every == 0
        if due and ahead is None and not self._foreseen(step):
            return replace(decision, measure=self.needs)
        return decision

    def _foresee(self, observation: Observation) -> None:
        present = observation.present
        if present is None or not present.any():
            return
        window = self._window if self._options.pool else None
        pooled = (window or Window.empty(len(self.domains))).add(observation, self._weights)
        released, _ = pooled.release(self._options.min_tokens)
        moved = None if released is None else self._moved(released)
        if moved is not None:
            # A limit on passes may have drawn by others than the given weights.
            given = observation.vector("sampling_weights")
            drawn_by = self._weights if given is None else given.copy()
            log_weights, score = moved
            self._ahead = _Ahead(
                step=observation.step, log_weights=log_weights, score=score, drawn_by=drawn_by
            )

    def _update(self, step: int, window: Window) -> FloatArray | None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.step == step:
            moved: tuple[FloatArray, FloatArray] | None = ahead.log_weights, ahead.score
        else:
            moved = self._moved(window)
        if moved is not None:
            self._log_weights, self._score = moved
            self._mean.add(self._domain_weights(self._log_weights))
        return None

    def _moved(self, window: Window) -> tuple[FloatArray, FloatArray] | None:
        """Return log alpha and the scores after an update; None if nothing was compared."""
        measured = window.present & (window.excess_tokens > 0)
        if not measured.any():
            return None
        excess = window.mean_excess
        if self._rule.excess == "domain":
            excess = np.maximum(window.mean_loss - window.mean_reference, 0.0)
        score = np.where(measured, excess, self._score)
        with np.errstate(over="ignore"):
            gain = self._rule.eta * score
        smoothing = self._rule.smoothing
        moved = multiply(self._log_weights, gain, smoothing=smoothing, support=self._support)
        return moved, score

    def _save(self) -> dict[str, Any]:
        ahead = None
        if self._ahead is not None:
            ahead = {
                "step": self._ahead.step,
                "log_weights": self._by_name(self._ahead.log_weights),
                "score": self._by_name(self._ahead.score),
                "drawn_by": self._by_name(self._ahead.drawn_by),
            }
        return {**self._save_weights(), "score": self._by_name(self._score), "ahead": ahead}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        weights, score = self._read_weights(rule), self._finite(rule["score"], "score")
        ahead = None
        if rule["ahead"] is not None:
            block = self._block(rule["ahead"], "ahead", _AHEAD_KEYS)
            ahead = _Ahead(
                step=self._whole(block["step"], "step", least=1),
                log_weights=self._finite(block["log_weights"], "log_weights"),
                score=self._finite(block["score"], "score"),
                drawn_by=self._finite(block["drawn_by"], "drawn_by"),
            )
        self._take_weights(weights)
        self._score, self._ahead = score, ahead

    def _edited(self, state: dict[str, Any], edit: Edit) -> dict[str, Any]:
        """Let a newcomer score what a domain does that has not been seen."""
        rule = dict(state["rule"])
        unseen = [
            name
            for name in edit.after
            if edit.source(name, edit.before) is None and name not in edit.retired
        ]
        rule["score"] = rule["score"] | dict.fromkeys(unseen, self._unseen)
        return {**state, "rule": rule}

    def _estimates(self) -> dict[str, Any]:
        return {
            "score": self._by_name(self._score),
            "domain_weights": self._by_name(self._domain_weights(self._log_weights)),
        }
