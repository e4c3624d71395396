"""The steps of a run that is told how often to read its data."""

from __future__ import annotations

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.training.domains import OpenDomains


def with_steps(config: Config, domains: OpenDomains, global_batch: int) -> Config:
    """Return the configuration with ``train_iters`` worked out from ``train_epochs``.

    Args:
        config: of the run; returned as it is where it gives ``train_iters``.
        domains: opened data.
        global_batch: samples per optimizer step.

    Raises:
        ConfigError: the data has not one batch.
    """
    training = config.training
    if not training.counts_epochs or training.train_epochs is None:
        return config
    windows = sum(domain.num_windows(0) for domain in domains.train)
    steps = windows * training.train_epochs // global_batch
    if steps < 1:
        raise ConfigError(
            f"train_epochs: {training.train_epochs} passes over {windows} samples have no batch of "
            f"{global_batch}; raise train_epochs, lower the batch, or give train_iters"
        )
    return config.model_copy(
        update={"training": training.model_copy(update={"train_iters": steps})}
    )
