"""Options of the guardrail."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError
from megatron.mixing.reading import require


@dataclass(frozen=True, kw_only=True)
class GuardrailOptions:
    """The block ``guardrail``: take control from a method that makes the run worse.

    Raises:
        ConfigError: a number out of its range, or an option that another leaves without use.
    """

    tolerance: float = field(
        default=0.02,
        metadata={
            "help": "how far the objective's held-out loss may be above the best since the method "
            "took control, and above what the fallback would have reached",
            "unit": "nats per token",
        },
    )
    standard_errors: float = field(
        default=2.0,
        metadata={
            "help": "how many standard errors of the difference it must exceed as well; more "
            "where the best is the best of many that noise could have ordered otherwise"
        },
    )
    patience: int = field(
        default=1, metadata={"help": "reports in a row that must show it before control goes over"}
    )
    fallback: Literal["given", "uniform", "natural"] | dict[str, float] = field(
        default="given",
        metadata={
            "help": "what draws after that: the given weights, uniform, natural (by training "
            "samples), or weights by domain name; floors and ceilings hold"
        },
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "an earlier run of the fallback, its folder or its metrics.jsonl: its report "
            "validations are what the fallback would have reached; null = a power law through "
            "those of this run that the fallback drew (from four on), if there are any"
        },
    )
    retry_after: int | None = field(
        default=None,
        metadata={"help": "steps after which the method gets control back; null = never"},
    )
    retries: int = field(
        default=3, metadata={"help": "how often it gets control back, with retry_after"}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("tolerance", "standard_errors"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        require("patience", self.patience, self.patience >= 1, "at least 1")
        after = self.retry_after
        require("retry_after", after, after is None or after >= 1, "at least 1, or null")
        require("retries", self.retries, self.retries >= 0, "at least 0")
        if isinstance(self.fallback, dict):
            values = list(self.fallback.values())
            if not (all(math.isfinite(v) and v >= 0 for v in values) and any(values)):
                raise ConfigError(
                    f"fallback is {self.fallback!r}; weights must be finite and at least 0, and "
                    f"one of them above 0"
                )
