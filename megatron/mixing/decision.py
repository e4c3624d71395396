"""What a mixing method tells the training loop, and what it may know of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.mixing.observation import FloatArray, Signal

CountLosses: TypeAlias = Callable[[FloatArray], FloatArray]
"""Takes tokens of each domain, [K], and returns nats per token, [K]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What the next step draws, and how its losses count.

    Attributes:
        sampling_weights: the distribution that draws the step, float64 [K], sum 1.
        loss_weights: weight of each token of a domain in the loss, [K]; None = all 1.
        validate: before this step, measure ``valid_loss``, observe it as the previous
            step with counts of 0, and ask again.
        fresh_quota: apportion this step and the following ones, this many in all, as
            one block, closing the carry of earlier steps; None = go on as usual.
        probe: index of the probe mixture this step belongs to, for the log.
        controller_weights: what a controller that does not draw would have drawn from,
            [K], for the log; None when it is in control.
        control: who draws in the method's place: the given weights (``"shadow"``) or the
            guardrail's (``"fallback"``); None = the method itself.
        measure: signals wanted on this very step's batch, measured with the weights as
            they are before it trains and told to ``foresee``, which may still change the
            loss weights (the samples are drawn by then).
        epochs: forecast of the passes over each domain at the end of the run if these
            weights hold, [K]; None where the sizes are not known.
    """

    sampling_weights: FloatArray
    loss_weights: FloatArray | None = None
    validate: bool = False
    fresh_quota: int | None = None
    probe: int | None = None
    controller_weights: FloatArray | None = None
    control: Literal["shadow", "fallback"] | None = None
    measure: frozenset[Signal] = frozenset()
    epochs: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a method may know of the run it steers; None = not known.

    Attributes:
        total_steps: optimizer steps of the whole run.
        tokens_per_step: tokens of a global batch.
        samples_per_step: samples of a global batch.
        draws_per_step: independent draws that make a global batch: as many as it has
            samples, or micro-batches when those are drawn whole.
        samples_per_epoch: training samples (windows) of each domain, in their order.
        vocab_size: number of token ids.
        targets: names of domains that are measured and never trained on.
        count_losses: takes how many tokens of each domain to count, [K], and returns the loss
            in nats per token that a table of these counts reaches on the domain, [K].
    """

    total_steps: int | None = None
    tokens_per_step: int | None = None
    samples_per_step: int | None = None
    draws_per_step: int | None = None
    samples_per_epoch: tuple[float, ...] | None = None
    vocab_size: int | None = None
    targets: tuple[str, ...] = ()
    count_losses: CountLosses | None = None
