"""Optimizer, learning-rate schedule and number format."""

from __future__ import annotations

from math import floor
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron.config.base import (
    Count,
    Fraction,
    Group,
    NonNegative,
    NonNegativeInt,
    Positive,
    invalid,
    listed,
)
from megatron.config.optimizers import KINDS, OptimizerKind
from megatron.config.scheduler import SchedulerConfig

Precision = Literal["fp32", "fp16", "bf16"]
Beta = Annotated[float, Field(ge=0, lt=1)]
_FORMULAS_OF_BOTH = ("constant", "linear", "cosine", "exponential")


class OptimizerConfig(Group):
    """The optimizer: a block `optimizer: {type, params: {…}}`, or flat keys."""

    type: Literal["adamw", "adam", "adam8bit", "lion", "sgd", "sm3", "madgrad_wd"] = "adamw"
    """`adamw` decays weights apart from the gradient, `adam` adds the decay to it. GPT-NeoX's
    `Adam` is `adamw`, unless its `adam_w_mode` is false. `adam8bit` needs bitsandbytes and a
    CUDA device (GPT-NeoX: `use_bnb_optimizer`)."""
    lr: Positive
    """Peak learning rate. `sm3` has 0.1 and `madgrad_wd` 0.01 where none is given."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(listed)] = (0.9, 0.999)
    """Adam's kinds and `lion`: decay rates of the running means of the gradient and (Adam) of its
    square. `lion` has [0.9, 0.99] where none is given."""
    eps: NonNegative = 1e-8
    """Added to the denominator of the update. `sm3` has 1e-30 and `madgrad_wd` 1e-6 where none is
    given; `lion` and `sgd` have none."""
    momentum: Beta = 0.0
    """`sgd`, `sm3`, `madgrad_wd`: share of the update before in the next. `madgrad_wd` has 0.9
    where none is given."""
    beta: Beta = 0.0
    """`sm3`: decay rate of the sums of squares; 0 = they only grow."""
    dampening: Beta = 0.0
    """`sgd`: share of the gradient that is left out of the momentum."""
    nesterov: bool = False
    """`sgd`: look ahead along the momentum."""
    weight_decay: NonNegative = 0.1
    """Weight decay; norms and biases have none. `sm3` knows no decay."""
    decay_embeddings: bool = True
    """Whether input and output embeddings decay, as in GPT-NeoX."""
    gradient_clipping: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.type not in ("sm3", "madgrad_wd") and self.eps == 0:
            raise invalid("eps", "should be greater than 0")
        if self.nesterov and (self.momentum == 0 or self.dampening > 0):
            raise invalid("nesterov", "needs momentum above 0 and no dampening")
        return self

    @property
    def kind(self) -> OptimizerKind:
        """What is known of its kind."""
        return KINDS[self.type]

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the elementwise tensors that it keeps of every parameter."""
        return self.kind.state(self.momentum)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that its kind has, beside ``lr`` and ``weight_decay``."""
        return {name: getattr(self, name) for name in self.kind.params}


class ScheduleConfig(Group):
    """The learning rate over the run: warm-up, then decay."""

    lr_decay_style: Literal[
        "constant",
        "linear",
        "cosine",
        "exponential",
        "linear_warmup_cosine",
        "linear_warmup_exponential",
        "wsd",
        "inverse_sqrt",
    ] = "linear"
    """Shape of the decay after the warm-up. Cosine ends at `min_lr`; linear runs towards 0 and
    exponential towards lr/2, both cut off at `min_lr`. `linear_warmup_cosine` and
    `linear_warmup_exponential` are DoReMi's and Aioli's, which end at `min_lr` (their `lr_end`);
    `wsd` stays at the peak and decays at the end; `inverse_sqrt` falls with the root of the
    step."""
    lr_formula: Literal["main", "fork"] = "main"
    """Whose formulas `constant`, `linear`, `cosine` and `exponential` follow: GPT-NeoX's main
    branch, or its online-data-mixing fork, where the decay never reaches its end."""
    lr_decay_iters: Count | None = None
    """Step at which the decay ends. Default: `train_iters`."""
    lr_decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """`lr_decay_iters` as a share of `train_iters`; has no effect where that is given."""
    min_lr: NonNegative = 0.0
    """Lowest learning rate after the warm-up."""
    warmup: Fraction = 0.01
    """Length of the linear warm-up, as a share of `lr_decay_iters`."""
    warmup_iters: NonNegativeInt | None = None
    """Length of the linear warm-up in steps; `warmup` has no effect where it is given."""
    wsd_decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """`wsd`: share of `lr_decay_iters` that is decay, at its end."""
    wsd_decay_shape: Literal["linear", "cosine", "exponential", "sqrt"] = "linear"
    """`wsd`: shape of that decay, from the peak to `min_lr`. With x from 0 to 1: linear 1 - x,
    cosine, sqrt 1 - √x, each between the two; exponential lr (min_lr/lr)^x, which needs
    `min_lr` above 0."""
    override_lr_scheduler: bool = False
    """A resumed run follows the schedule of its configuration. It does so anyway, and says so where
    the checkpoint's was another; true leaves the note out."""
    use_checkpoint_lr_scheduler: bool = False
    """A resumed run follows the schedule that its checkpoint was written with, whatever the
    configuration says (peak, style, warm-up, end)."""
    scheduler: SchedulerConfig | None = None
    """DeepSpeed's block `scheduler: {type, params}`: one of its schedules decides the learning rate
    alone, as in GPT-NeoX, where DeepSpeed takes it before GPT-NeoX's own."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lr_formula == "fork" and self.lr_decay_style not in _FORMULAS_OF_BOTH:
            raise invalid("lr_formula", f"the fork has no style {self.lr_decay_style}; use main")
        if (
            self.lr_decay_style == "wsd"
            and self.wsd_decay_shape == "exponential"
            and self.min_lr == 0
        ):
            raise invalid("wsd_decay_shape", "exponential needs min_lr above 0")
        if self.override_lr_scheduler and self.use_checkpoint_lr_scheduler:
            raise invalid("override_lr_scheduler", "contradicts use_checkpoint_lr_scheduler")
        return self

    def decay_steps(self, train_iters: int) -> int:
        """Return the step at which the decay ends in a run of ``train_iters`` steps."""
        if self.lr_decay_iters is not None:
            return self.lr_decay_iters
        if self.lr_decay_fraction is not None:
            return max(1, floor(train_iters * self.lr_decay_fraction))
        return train_iters

    def warmup_steps(self, train_iters: int) -> float:
        """Return the warm-up's length in steps, which GPT-NeoX does not round."""
        if self.warmup_iters is not None:
            return float(self.warmup_iters)
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
