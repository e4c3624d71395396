"""What is spent on choosing, and what that leaves for training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError
from megatron.selection.base import Cost
from megatron.selection.cost_model import Model


@dataclass(frozen=True, kw_only=True)
class Bill:
    """A budget of floating-point operations, shared between choosing and training.

    Attributes:
        flops: all there is.
        scoring: what the table of scores has cost.
        model: that will be trained.
        epochs: passes over what is chosen.
    """

    flops: float
    scoring: Cost
    model: Model
    epochs: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a budget that leaves nothing.

        Raises:
            ConfigError: naming what it would take.
        """
        if not self.epochs > 0:
            raise ConfigError(f"--epochs {self.epochs:g}: it must be above 0")
        if self.tokens < 1:
            raise ConfigError(
                f"--flops {self.flops:.4g} leaves nothing to train with: scoring has cost "
                f"{self.scoring.flops:.4g}, and a token costs {self._price:.4g} "
                f"({self.model.name}); raise the budget, or choose by a cheaper method"
            )

    @property
    def tokens(self) -> float:
        """Tokens that may be chosen."""
        return (self.flops - self.scoring.flops) / self._price

    def lines(self, tokens: int) -> list[str]:
        """Return the bill of so many chosen tokens, as lines."""
        training = tokens * self._price
        rest = self.flops - self.scoring.flops - training
        passes = "" if self.epochs == 1 else f", {self.epochs:g} epochs"
        rows = [
            ("budget", self.flops, ""),
            ("scoring", self.scoring.flops, f"{self.scoring.tokens:,} tokens read by models"),
            ("training", training, f"{self.model.name} on {tokens:,} tokens{passes}"),
            ("left over", rest, ""),
        ]
        return [
            f"{name:<10}{value:>12.4g} FLOPs {100 * value / self.flops:6.2f} %  {why}".rstrip()
            for name, value, why in rows
        ]

    @property
    def _price(self) -> float:
        """Operations for each chosen token."""
        return self.epochs * self.model.training(1.0)
