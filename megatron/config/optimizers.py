"""The kinds of optimizers: names they are asked for by, parameters, and the state they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What the configuration has to know of one kind.

    Attributes:
        params: its parameters beside ``lr`` and ``weight_decay``, with the values they have
            where they are not given.
        lr: peak learning rate where none is given; None = it has to be.
        decays: whether it knows weight decay.
        slots: elementwise state tensors, by the name they have in a checkpoint.
        with_momentum: further ones if ``momentum`` is above 0.
        counts: whether it counts its steps, under the name ``step``.
        slot_bytes: bytes of one number of such a tensor.
        convertible: whether the state can be laid out anew for other ranks.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    decays: bool = True
    slots: tuple[str, ...] = ()
    with_momentum: tuple[str, ...] = ()
    counts: bool = False
    slot_bytes: int = 4
    convertible: bool = True

    def state(self, momentum: float) -> tuple[str, ...]:
        """Name the elementwise state tensors of an optimizer with this ``momentum``."""
        return self.slots + (self.with_momentum if momentum > 0 else ())


_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_MOMENTS = ("exp_avg", "exp_avg_sq")

KINDS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(params=_ADAM, slots=_MOMENTS, counts=True),
    "adam": OptimizerKind(params=_ADAM, slots=_MOMENTS, counts=True),
    "adam8bit": OptimizerKind(
        params=_ADAM, slots=("state1", "state2"), slot_bytes=1, convertible=False
    ),
    "lion": OptimizerKind(params={"betas": (0.9, 0.99)}, slots=("exp_avg",)),
    "sgd": OptimizerKind(
        params={"momentum": 0.0, "dampening": 0.0, "nesterov": False},
        with_momentum=("momentum_buffer",),
    ),
    "sm3": OptimizerKind(
        params={"momentum": 0.0, "beta": 0.0, "eps": 1e-30},
        lr=0.1,
        decays=False,
        with_momentum=("momentum_buffer",),
        convertible=False,
    ),
    "madgrad_wd": OptimizerKind(
        params={"momentum": 0.9, "eps": 1e-6},
        lr=0.01,
        slots=("grad_sum_sq", "s"),
        counts=True,
        with_momentum=("x0",),
    ),
}
"""Sources: Adam, Kingma & Ba 2015; AdamW, Loshchilov & Hutter 2019; 8-bit, Dettmers et al. 2022;
Lion, Chen et al. 2023; SM3, Anil et al. 2019; MADGRAD, Defazio & Jelassi 2022."""

OPTIMIZER_PARAMS = tuple(dict.fromkeys(key for kind in KINDS.values() for key in kind.params))
"""Every parameter that some kind has beside ``lr`` and ``weight_decay``."""

NAMES: dict[str, str] = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "adamw",
    "cpu_adam": "adamw",
    "cpu_torch_adam": "adam",
    "adam8bit": "adam8bit",
    "adamw8bit": "adam8bit",
    "lion": "lion",
    "sgd": "sgd",
    "sm3": "sm3",
    "madgrad_wd": "madgrad_wd",
}
"""GPT-NeoX's and DeepSpeed's names in lower case, and the kind that each is."""

MAPPED: dict[str, str] = {
    "cpu_adam": "torch's AdamW is used, which needs no compiler; it runs where the state is: "
    "zero_optimization: {offload_optimizer: {device: cpu}} keeps that on the host",
    "cpu_torch_adam": "torch's Adam is used, as there; it runs where the state is: "
    "zero_optimization: {offload_optimizer: {device: cpu}} keeps that on the host",
}
"""What is said of a name that asks for a place and not for a rule."""

_ONE_BIT = (
    "was code of DeepSpeed's, which DeepSpeed no longer has (0.19); use Adam with "
    "communication_data_type: fp16 to send less"
)
REFUSED_KINDS: dict[str, str] = {
    "onebitadam": _ONE_BIT,
    "zerooneadam": _ONE_BIT,
    "onebitlamb": _ONE_BIT,
    "muon": "orthogonalises whole matrices, of which ZeRO's and tensor ranks hold parts, and "
    "GPT-NeoX has none; use Adam or Lion",
    "muadam": "is Adam with µP's learning rates; use Adam with use_mup",
    "muadamw": "is AdamW with µP's learning rates; use AdamW with use_mup",
    "musgd": "is SGD with µP's learning rates, which are known for Adam's kind alone; use Adam "
    "with use_mup",
    "adagrad": "is not offered; use SM3, which keeps less of the same",
    "lamb": "is not offered; use Adam",
}
"""Names that are known and refused, each with the reason."""
