"""From what the loop knows to what the sinks take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron.engine.observer import StepOutcome
from megatron.mixing.exhaustion import ExhaustionWatch
from megatron.monitor.overhead import Overhead
from megatron.monitor.record import (
    AuditRecord,
    StepRecord,
    TaskRecord,
    ValidationRecord,
    is_logged,
)
from megatron.monitor.sink import SinkGroup
from megatron.monitor.throughput import Throughput
from megatron.signals.ledger import StepTotals
from megatron.training.planner import Planned
from megatron.training.token_costs import TokenCosts

FloatArray = npt.NDArray[np.float64]


class RunRecorder:
    """Names and times the steps for the sinks; with no sinks it does nothing.

    Args:
        sinks: where records go (empty on every rank but the first).
        domains: names in the order of the arrays.
        targets: names of what is only measured, which follow where losses are held out.
        throughput: the run's clock.
        epochs: passes over each domain's training split so far [K].
        describe: the mixer's estimates, for the charts.
        loss_scale: the current loss scale, or None where there is none.
        log_interval: steps between two lines of the metrics.
        total_steps: length of the run.
        bytes_per_token: of each domain's text, where known, for bits per byte.
        audit: whether the samples of every step are recorded.
        overhead: what mixing took since the step before.
        token_costs: what a step costs in tokens beside those it trains on.
        exhaustion: speaks up before a domain's data runs out.
        average_weights: by split, the weights of domains and targets in its weighted average,
            where the configuration gives them; else the mixture's are taken.
        tokens_per_character: of each domain's text, where perplexity per character is wanted.
        say: takes a line for the console.
    """

    def __init__(
        self,
        sinks: SinkGroup,
        *,
        domains: Sequence[str],
        targets: Sequence[str] = (),
        throughput: Throughput,
        epochs: Callable[[], FloatArray],
        describe: Callable[[], Mapping[str, object]],
        loss_scale: Callable[[], float] | None,
        log_interval: int,
        total_steps: int,
        bytes_per_token: Mapping[str, float],
        audit: bool,
        overhead: Overhead,
        token_costs: TokenCosts,
        exhaustion: ExhaustionWatch | None = None,
        average_weights: Mapping[str, Mapping[str, float]] | None = None,
        tokens_per_character: Mapping[str, float] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Keep the parts."""
        self._sinks = sinks
        self._domains = tuple(domains)
        self._measured = (*domains, *targets)
        self._throughput = throughput
        self._epochs = epochs
        self._describe = describe
        self._loss_scale = loss_scale
        self._log_interval = log_interval
        self._total_steps = total_steps
        self._bytes_per_token = bytes_per_token
        self._audit = audit
        self._overhead = overhead
        self._token_costs = token_costs
        self._exhaustion = exhaustion
        self._average_weights = average_weights or {}
        self._tokens_per_character = tokens_per_character or {}
        self._say = say

    def step(
        self,
        planned: Planned,
        totals: StepTotals,
        outcome: StepOutcome,
        *,
        lr: float,
        skipped: bool,
    ) -> None:
        """Record one step."""
        seconds = self._throughput.step(int(totals.token_count.sum()))
        overhead = self._overhead.take()
        if not len(self._sinks):
            return
        plan, decision = planned.plan, planned.decision
        logged = is_logged(plan.step, self._log_interval)
        self._sinks.step(
            StepRecord(
                step=plan.step,
                domains=self._domains,
                loss=totals.mean_loss,
                learning_rate=lr,
                probability=plan.weights,
                domain_loss=totals.domain_loss,
                tokens=totals.token_count.astype(np.int64),
                samples=np.bincount(plan.domain, minlength=len(self._domains)),
                epochs=self._epochs(),
                tokens_per_second=self._throughput.tokens_per_second,
                seconds=seconds,
                eta_seconds=self._throughput.eta_seconds(self._total_steps - plan.step),
                mfu=self._throughput.mfu,
                # Reading the norm waits for the device, so only a logged step does.
                grad_norm=_number(outcome.grad_norm) if logged else None,
                loss_scale=self._loss_scale() if self._loss_scale and logged else None,
                statistics=outcome.statistics,
                loss_weight=decision.loss_weights,
                **self._held_out(planned.valid_loss),
                loss_error=totals.standard_error if logged else None,
                excess_loss=_mean(totals, totals.excess_sum),
                reference_loss=_mean(totals, totals.reference_sum),
                batch_valid_loss=planned.measured.get("batch_valid_loss"),
                gradient_alignment=planned.measured.get("gradient_alignment"),
                control=decision.control,
                epochs_forecast=decision.epochs,
                fresh_quota=decision.fresh_quota,
                probe=decision.probe,
                skipped=skipped,
                controller_probability=decision.controller_weights,
                estimates=self._describe() if logged else {},
                overhead=overhead,
                extra_tokens=self._token_costs.of(planned),
            )
        )
        if self._exhaustion is not None:
            seen = planned.samples_seen.astype(np.float64)
            lasting = plan.weights if decision.probe is None else None
            for text in self._exhaustion.messages(step=plan.step, seen=seen, weights=lasting):
                self._say(text)
        if self._audit:
            self._sinks.audit(
                AuditRecord.from_plan(
                    step=plan.step,
                    domains=self._domains,
                    domain=plan.domain,
                    epoch=plan.epoch,
                    sample=plan.sample,
                )
            )

    def _held_out(self, losses: FloatArray | None) -> dict[str, Any]:
        """Divide a controller's measurement [K + M] into the domains' and the targets'."""
        if losses is None:
            return {}
        count = len(self._domains)
        targets = dict(zip(self._measured[count:], losses[count:].tolist(), strict=True))
        return {"valid_loss": losses[:count], "target_loss": targets or None}

    def validation(
        self,
        step: int,
        losses: FloatArray,
        *,
        split: str,
        weights: FloatArray,
        seconds: float,
        review: str | None = None,
    ) -> None:
        """Record a measurement of held-out losses [K + M]; NaN = no held-out data."""
        if not len(self._sinks):
            return
        measured = {
            name: float(loss)
            for name, loss in zip(self._measured, losses, strict=True)
            if not np.isnan(loss)
        }
        self._sinks.validation(
            ValidationRecord(
                step=step,
                valid_loss=measured,
                bits_per_byte={
                    name: loss / np.log(2.0) / self._bytes_per_token[name]
                    for name, loss in measured.items()
                    if name in self._bytes_per_token
                },
                character_loss={
                    name: loss * self._tokens_per_character[name]
                    for name, loss in measured.items()
                    if name in self._tokens_per_character
                },
                weights=self._average_weights.get(split)
                or dict(zip(self._domains, weights.tolist(), strict=True)),
                split=split,
                seconds=seconds,
                review=review,
            )
        )

    def tasks(
        self,
        step: int,
        found: Mapping[str, Mapping[str, float]],
        num_fewshot: Mapping[str, int],
        *,
        seconds: float,
    ) -> None:
        """Record an evaluation by tasks: metrics, and numbers of examples, by task."""
        self._sinks.tasks(
            TaskRecord(step=step, tasks=found, num_fewshot=num_fewshot, seconds=seconds)
        )


def _mean(totals: StepTotals, total: FloatArray | None) -> FloatArray | None:
    return None if total is None else totals.mean(total)


def _number(value: float | torch.Tensor | None) -> float | None:
    return None if value is None else float(value)
