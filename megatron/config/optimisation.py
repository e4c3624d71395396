"""Optimizer, learning-rate schedule and number format."""

from __future__ import annotations

from math import floor
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron.config.base import Count, Fraction, Group, NonNegative, NonNegativeInt, Positive

Precision = Literal["fp32", "fp16", "bf16"]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class OptimizerConfig(Group):
    """The optimizer: a block `optimizer: {type, params: {…}}`, or flat keys."""

    type: Literal["adamw", "adam"] = "adamw"
    """`adamw` decays weights apart from the gradient, `adam` adds the decay to it. GPT-NeoX's
    `Adam` is `adamw`, unless its `adam_w_mode` is false."""
    lr: Positive
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_pair)] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegative = 0.1
    """Weight decay; norms and biases have none."""
    gradient_clipping: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""


class ScheduleConfig(Group):
    """The learning rate over the run: warm-up, then decay."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] = "linear"
    """Shape of the decay after the warm-up. Cosine ends at `min_lr`; linear runs towards 0 and
    exponential towards lr/2, both cut off at `min_lr`."""
    lr_decay_iters: Count | None = None
    """Step at which the decay ends. Default: `train_iters`."""
    lr_decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """`lr_decay_iters` as a share of `train_iters`; has no effect where that is given."""
    min_lr: NonNegative = 0.0
    """Lowest learning rate after the warm-up."""
    warmup: Fraction = 0.01
    """Length of the linear warm-up, as a share of `lr_decay_iters`."""

    def decay_steps(self, train_iters: int) -> int:
        """Return the step at which the decay ends in a run of ``train_iters`` steps."""
        if self.lr_decay_iters is not None:
            return self.lr_decay_iters
        if self.lr_decay_fraction is not None:
            return max(1, floor(train_iters * self.lr_decay_fraction))
        return train_iters

    def warmup_steps(self, train_iters: int) -> float:
        """Return the warm-up's length in steps, which GPT-NeoX does not round."""
        return self.warmup * self.decay_steps(train_iters)


class LossScaleConfig(Group):
    """Loss scaling under fp16: the block `fp16: {enabled: true, …}`."""

    loss_scale: NonNegative = 0.0
    """Fixed loss scale; 0 = dynamic."""
    initial_scale_power: NonNegativeInt = 16
    """The dynamic scale starts at 2 to this power."""
    loss_scale_window: Count = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: Count = 2
    """Overflows that are let pass before the scale is halved."""
    min_loss_scale: Count = 1
    """Lowest dynamic scale."""
    consecutive_hysteresis: bool = False
    """Refill the hysteresis at every step without overflow."""
