"""Dynamic batch loading: more of the domains that are furthest from where they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.errors import ConfigError, DataError
from megatron.mixing.base import RunContext
from megatron.mixing.earlier_run import final_losses
from megatron.mixing.held_out import HeldOutMixer
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions, by_domain, require
from megatron.mixing.simplex import normalise


@dataclass(frozen=True, kw_only=True)
class DynamicLoadingOptions(CommonOptions):
    """Options of ``dynamic_loading``; it needs ``targets`` or ``targets_from``.

    Raises:
        ConfigError: both kinds of targets, or a number out of its range.
    """

    targets: dict[str, float] | list[float] | None = field(
        default=None,
        metadata={
            "help": "the held-out loss that each domain should reach: a mapping that names every "
            "domain, or a list in the order of the domains",
            "unit": "nats per token",
        },
    )
    targets_from: str | None = field(
        default=None,
        metadata={
            "help": "an earlier run whose last validation losses are the targets: its folder, or "
            "its metrics.jsonl"
        },
    )
    smoothing: float = field(
        default=1e-4,
        metadata={"help": "share of the uniform distribution in the weights (c)"},
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        super().__post_init__()
        if self.targets is not None and self.targets_from is not None:
            raise ConfigError("targets and targets_from exclude each other; give one of them")
        require("smoothing", self.smoothing, 0 <= self.smoothing <= 1, "between 0 and 1")


class DynamicLoading(HeldOutMixer):
    """Weights that grow with the distance of a held-out loss from its target.

    At each update p_i is multiplied by exp(max(V_i - target_i, 0)) and normalised; then
    p <- (1 - c) p + c / K.  A domain without held-out data counts as being on target.

    Source: Sheared LLaMA (arXiv 2310.06694), algorithm 1.
    """

    method = "dynamic_loading"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: DynamicLoadingOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._smoothing = options.smoothing
        self._targets = read_targets(
            self.method, options.targets, options.targets_from, self.domains
        )

    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        valid_loss = valid_loss[: len(self.domains)]
        if np.isnan(valid_loss).all():
            return None
        with np.errstate(over="ignore"):
            distance = np.maximum(valid_loss - self._targets, 0.0)
        distance = np.where(np.isnan(valid_loss), 0.0, distance)
        if not np.isfinite(distance).all():
            return None
        reachable = self._weights > 0
        # The shift by the largest exponent that counts leaves one factor of exactly 1.
        with np.errstate(under="ignore"):
            factor = np.exp(np.minimum(distance - distance[reachable].max(), 0.0))
        grown = normalise(self._weights * factor)
        return (1.0 - self._smoothing) * grown + self._smoothing / len(self.domains)

    def _estimates(self) -> dict[str, Any]:
        return {"target": self._by_name(self._targets)}


def read_targets(
    method: str,
    targets: Mapping[str, float] | Sequence[float] | None,
    targets_from: str | None,
    domains: Sequence[str],
) -> FloatArray:
    """Return the held-out loss that each domain should reach, nats per token, [K].

    Args:
        method: whose targets they are, for messages.
        targets: by name, or in the order of the domains.
        targets_from: instead: an earlier run that reached them.
        domains: names.

    Raises:
        ConfigError: neither is given, or a domain has no target.
        DataError: the earlier run cannot be read.
    """
    where = f"mixing method '{method}'"
    if targets_from is not None:
        try:
            return final_losses(targets_from, domains)
        except DataError as error:
            raise DataError(f"{where}: targets_from: {error}") from error
    if targets is None:
        raise ConfigError(
            f"{where}: no targets; give targets (the held-out loss that each domain should "
            f"reach) or targets_from (an earlier run that reached them)"
        )
    return by_domain(f"{where}: targets", targets, domains, missing=None)
