"""What happens when a step is not finite, or its loss has spiked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron.data.plan import Plan
from megatron.errors import RunError
from megatron.signals.ledger import StepTotals
from megatron.state import check_state
from megatron.training.spikes import Spike, SpikeGuard

_VERSION = 1
_NAMED_SAMPLES = 8


class NonFiniteError(RunError):
    """The loss or the gradient of a step was not finite, and the policy is to stop."""

    exit_code = 1


class NonFiniteGuard:
    """Counts steps with a non-finite loss or gradient and stops the run by the policy.

    Under fp16 a gradient overflow with finite losses is the loss scale at work, and does
    not count.

    Args:
        limit: how many in a row stop the run; 0 (policy ``stop``) means the first one.
        loss_scaling: whether the run scales its loss (fp16).
        domains: names of the domains, for the message.
    """

    def __init__(self, *, limit: int, loss_scaling: bool, domains: Sequence[str]) -> None:
        """Start with none in a row."""
        self._limit = max(limit, 1)
        self._loss_scaling = loss_scaling
        self._domains = domains
        self._in_row = 0

    def check(self, plan: Plan, totals: StepTotals) -> bool:
        """Return whether the step counts as skipped; every rank comes to the same answer.

        Raises:
            NonFiniteError: the policy is to stop; names step, domains and samples.
        """
        if totals.finite and not totals.skipped:
            self._in_row = 0
            return False
        if totals.finite and self._loss_scaling:
            return True
        self._in_row += 1
        if self._in_row >= self._limit:
            raise NonFiniteError(self._describe(plan, totals))
        return True

    def _describe(self, plan: Plan, totals: StepTotals) -> str:
        bad = np.flatnonzero(~np.isfinite(totals.loss_sum))
        row = f" ({self._in_row} in a row)" if self._in_row > 1 else ""
        remedy = (
            "; the last checkpoint is intact: lower the learning rate, look at these samples, "
            "or let steps be left out with on_nonfinite: skip(k)"
        )
        if bad.size == 0:
            return f"step {plan.step}: the gradient is not finite{row}, every loss is{remedy}"
        named = []
        for domain in bad.tolist():
            slots = np.flatnonzero(plan.domain == domain)
            samples = ", ".join(
                f"[epoch {plan.epoch[slot]}, sample {plan.sample[slot]}]"
                for slot in slots[:_NAMED_SAMPLES]
            )
            more = f" and {slots.size - _NAMED_SAMPLES} more" if slots.size > _NAMED_SAMPLES else ""
            named.append(f"'{self._domains[domain]}' ({samples}{more})")
        return f"step {plan.step}: the loss is not finite{row} in {', '.join(named)}{remedy}"

    def state_dict(self) -> dict[str, Any]:
        """Return the count in a row."""
        return {"version": _VERSION, "in_row": self._in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` gave."""
        check_state("the non-finite guard", state, version=_VERSION, keys=("in_row",))
        self._in_row = int(state["in_row"])


class RunGuard:
    """Both guards of a run's steps, asked once a step; all ranks come to the same answer.

    Attributes:
        nonfinite: policy for steps that are not finite.
        spikes: for those whose loss has spiked; None without such a policy.
        go_back: takes weights and optimizer from the newest checkpoint, given the step that is
            taken back; returns the checkpoint's name, having called its second argument with
            it first.  The run sets it.
    """

    def __init__(
        self,
        nonfinite: NonFiniteGuard,
        spikes: SpikeGuard | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Put the two together; ``say`` takes a line for the console."""
        self.nonfinite = nonfinite
        self.spikes = spikes
        self.go_back: Callable[[int, Callable[[str], None]], str] | None = None
        self._say = say

    def check(self, plan: Plan, totals: StepTotals) -> bool:
        """Return whether the step counts as skipped.

        Raises:
            NonFiniteError: see :meth:`NonFiniteGuard.check`.
            SpikeError: see :meth:`SpikeGuard.after`.
        """
        if self.nonfinite.check(plan, totals):
            return True
        if self.spikes is None:
            return False
        spike = self.spikes.after(plan.step, totals.loss_sum, totals.token_count)
        return spike is not None and self._follow(plan.step, spike, self.spikes)

    def _follow(self, step: int, spike: Spike, spikes: SpikeGuard) -> bool:
        if spikes.policy == "warn":
            self._say(f"warning: step {step}: {spike}")
            return False
        if spikes.policy == "skip":
            self._say(f"step {step} is left out: {spike}")
            return True
        assert self.go_back is not None, "the run has not said how to go back"
        name = self.go_back(step, lambda name: spikes.count_rollback(step, spike, name))
        self._say(
            f"step {step}: {spike}; weights and optimizer are those of {name} again, and "
            "the data goes on"
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return both states; without a policy for spikes, that of the other alone."""
        state = self.nonfinite.state_dict()
        return state if self.spikes is None else {**state, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, of a run with or without a policy for spikes."""
        held = dict(state)
        learnt = held.pop("spikes", None)
        self.nonfinite.load_state_dict(held)
        if self.spikes is not None and learnt is not None:
            self.spikes.load_state_dict(learnt)
