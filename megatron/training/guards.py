"""What watches a run's steps, made from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.engine.undo import ask_before_update
from megatron.signals.ledger import Ledger
from megatron.training.guard import NonFiniteGuard, RunGuard
from megatron.training.spikes import SpikeGuard


def build_guard(
    config: Config,
    domains: Sequence[str],
    engine: TrainEngine,
    ledger: Ledger,
    say: Callable[[str], None],
) -> RunGuard:
    """Make a run's guards, and let them ask before an update where the policy needs that.

    Args:
        config: of the run.
        domains: names in the order of the ledger.
        engine: runs the steps.
        ledger: holds the losses of the step under way.
        say: takes a line for the console.
    """
    training = config.training
    nonfinite = NonFiniteGuard(
        limit=training.nonfinite_limit,
        loss_scaling=config.precision == "fp16",
        domains=domains,
    )
    policy, limit = training.spike_policy
    if policy == "off":
        return RunGuard(nonfinite)
    spikes = SpikeGuard(
        policy=policy,
        limit=limit,
        sigma=training.loss_spike_sigma,
        window=training.loss_spike_window,
        domains=domains,
    )
    if policy == "skip":
        ask_before_update(engine, lambda: spikes.accepts(*ledger.peek()))
    return RunGuard(nonfinite, spikes, say=say)
