"""The blocks that GPT-NeoX shares with DeepSpeed: optimizer, number formats, ZeRO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megatron.config.draft import Draft
from megatron.config.neox import Refusal, is_off
from megatron.config.node import Node, node_of
from megatron.config.optimisation import LossScaleConfig
from megatron.config.optimizers import KINDS, MAPPED, NAMES, OPTIMIZER_PARAMS, REFUSED_KINDS
from megatron.config.suggest import did_you_mean

_PARAMS = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "max_grad_norm": "gradient_clipping",
    **{name: name for name in OPTIMIZER_PARAMS},
}
_ADAM_NAMES = tuple(name for name, kind in NAMES.items() if kind in ("adam", "adamw"))
# parameters that are fine as long as they have this value
_FIXED: dict[str, Any] = {"bias_correction": True, "amsgrad": False}

_QUANTISED = Refusal(instead="quantised communication is not offered; remove the key")
ZERO_REFUSED: dict[str, Refusal] = {
    "cpu_offload_use_pin_memory": Refusal(
        instead="use offload_optimizer: {device: cpu, pin_memory: true}"
    ),
    "zenflow": Refusal(instead="use offload_optimizer: {device: cpu}"),
    "zero_quantized_weights": _QUANTISED,
    "zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_quantized_gradients": _QUANTISED,
    "zero_hpz_partition_size": Refusal(instead="use 1 or remove the key", neutral=(1,)),
    "elastic_checkpoint": Refusal(
        instead="a run may be resumed on another number of ranks anyway; remove the key"
    ),
    "legacy_stage1": Refusal(instead="use stage: 1"),
}
ZERO_BOOLS = (
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "use_multi_rank_bucket_allreduce",
)
ZERO_SIZES = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
)
ZERO_OFFLOAD = ("offload_optimizer", "offload_param")
# Older spellings that take true or false.
ZERO_OFFLOAD_FLAGS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}


def unknown(draft: Draft, node: Node, known: Iterable[str], what: str) -> None:
    """Report an unknown key of a block."""
    key = node.name.rsplit(".", 1)[-1].replace("-", "_")
    draft.problems.add(node, f"unknown {what}{did_you_mean(key, known)}", show=False)


def read_optimizer(draft: Draft, node: Node) -> None:
    """Read ``optimizer: {type, params: {…}}``."""
    entries = dict(draft.block(node))
    params = entries.pop("params", None)
    kind = entries.pop("type", None)
    for key, entry in entries.items():
        if key not in _PARAMS:
            unknown(draft, entry, ["type", "params", *_PARAMS], "key of optimizer")
    given = {**(draft.block(params) if params else {})}
    decoupled = given.pop("adam_w_mode", None)
    for key, entry in given.items():
        if key in _FIXED:
            if entry.value is not None and entry.value is not _FIXED[key]:
                draft.problems.add(entry, "is not offered; remove the key")
        elif key == "torch_adam":
            draft.ignore(entry.name, "torch's optimizer is used")
        elif key not in _PARAMS:
            unknown(draft, entry, [*_PARAMS, "adam_w_mode"], "parameter of the optimizer")
    for key, entry in [*entries.items(), *given.items()]:
        if key in _PARAMS and entry.value is not None:
            draft.put("optimizer", _PARAMS[key], entry)
    if kind is not None and kind.value is not None:
        put_optimizer_type(draft, kind)
    if decoupled is not None and decoupled.value is not None:
        if not isinstance(decoupled.value, bool):
            draft.problems.add(decoupled, "should be true or false")
        elif kind is not None and str(kind.value).lower() not in _ADAM_NAMES:
            draft.problems.add(decoupled, f"belongs to Adam, and the type is {kind.value}")
        elif decoupled.value is False and kind is not None and str(kind.value).lower() == "adamw":
            draft.problems.add(decoupled, "contradicts type: AdamW; use type: Adam")
        elif decoupled.value is False:
            _coupled(draft, decoupled)


def put_optimizer_type(draft: Draft, node: Node) -> None:
    """Set the kind of optimizer from GPT-NeoX's name of it."""
    name = node.value
    if not isinstance(name, str):
        draft.problems.add(node, "should be the name of an optimizer, such as Adam")
        return
    lowered = name.lower()
    if lowered in REFUSED_KINDS:
        draft.problems.add(node, f"refused: {name} {REFUSED_KINDS[lowered]}")
    elif lowered not in NAMES:
        known = ("Adam", "AdamW", "Adam8bit", "CPU_Adam", "Lion", "SGD", "SM3", "madgrad_wd")
        text = f"is not offered; use one of {', '.join(known)}"
        draft.problems.add(node, text + did_you_mean(name, known))
    else:
        if lowered in MAPPED:
            draft.ignore(f"{node.name}: {name}", MAPPED[lowered])
        draft.put("optimizer", "type", replace(node, value=NAMES[lowered]))


def read_bnb(draft: Draft, node: Node) -> None:
    """Read ``use_bnb_optimizer``: Adam with state of 8 bits."""
    if not isinstance(node.value, bool):
        draft.problems.add(node, "should be true or false")
    elif node.value:
        draft.groups.setdefault("", {})["use_bnb_optimizer"] = node


def complete_optimizer(draft: Draft) -> None:
    """Fill in what a kind of optimizer has by default, and refuse what it has not."""
    fields = draft.groups.setdefault("optimizer", {})
    eight = draft.groups.get("", {}).pop("use_bnb_optimizer", None)
    kind = fields.get("type")
    name = str(kind.value) if kind is not None else "adamw"
    if eight is not None:
        if name not in ("adam", "adamw", "adam8bit"):
            draft.problems.add(eight, f"belongs to Adam, and the optimizer is {name}")
        name = "adam8bit"
        fields["type"] = replace(kind or eight, value=name)
    if name not in KINDS:
        return
    known = KINDS[name]
    for key in sorted(set(OPTIMIZER_PARAMS) - known.params.keys()):
        if (given := fields.get(key)) is not None:
            draft.problems.add(given, f"{name} has no such parameter{_offer(known.params)}")
    if kind is None and eight is None:
        return
    place = fields["type"]
    defaults = {**known.params, **({} if known.lr is None else {"lr": known.lr})}
    if not known.decays:
        if (decay := fields.pop("weight_decay", None)) is not None and decay.value:
            draft.ignore(decay.name, f"{name} knows no weight decay")
        defaults["weight_decay"] = 0.0
    for key, value in defaults.items():
        if key not in fields:
            plain = list(value) if isinstance(value, tuple) else value
            fields[key] = node_of(plain, place.mark, key)


def _offer(params: Iterable[str]) -> str:
    return f"; it has lr, weight_decay{''.join(f', {name}' for name in params)}"


def _coupled(draft: Draft, node: Node) -> None:
    """``adam_w_mode: false``: the decay is added to the gradient."""
    draft.groups.setdefault("optimizer", {})["type"] = replace(node, value="adam")


def read_fp16(draft: Draft, node: Node) -> None:
    """Read ``fp16: {enabled, loss_scale, …}``."""
    entries = dict(draft.block(node))
    kind = entries.pop("type", None)
    enabled = entries.pop("enabled", None)
    entries.pop("fp16", None)
    name = "fp16"
    if kind is not None and kind.value is not None:
        if str(kind.value).lower() in ("bfloat16", "bf16"):
            name = "bf16"
        elif str(kind.value).lower() not in ("fp16", "float16"):
            draft.problems.add(kind, "should be fp16 or bfloat16")
    _enable(draft, enabled, name)
    for key, entry in entries.items():
        if key in LossScaleConfig.model_fields:
            if entry.value is not None:
                draft.put("fp16", key, entry)
        elif key == "auto_cast":
            draft.ignore(entry.name, "the inputs are token ids")
        elif key.startswith("fp16_master_weights_and_grad"):
            if not is_off(entry.plain()):
                draft.problems.add(entry, "refused: weights have fp32 masters; remove the key")
        else:
            known = ["enabled", *LossScaleConfig.model_fields]
            unknown(draft, entry, known, "key of fp16")


def read_bf16(draft: Draft, node: Node) -> None:
    """Read ``bf16: {enabled}``; loss scaling in it has no effect."""
    for key, entry in draft.block(node).items():
        if key == "enabled":
            _enable(draft, entry, "bf16")
        elif key in LossScaleConfig.model_fields or key == "bf16":
            draft.ignore(entry.name, "bf16 needs no loss scaling")
        else:
            unknown(draft, entry, ["enabled"], "key of bf16")


def _enable(draft: Draft, node: Node | None, precision: str) -> None:
    if node is None or node.value is None:
        return
    if not isinstance(node.value, bool):
        draft.problems.add(node, "should be true or false")
    elif node.value:
        draft.put("", "precision", replace(node, value=precision))


def read_precision(draft: Draft, node: Node) -> None:
    """Read ``precision: fp32 | fp16 | bfloat16``."""
    names = {"bfloat16": "bf16", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    key = node.value.lower() if isinstance(node.value, str) else ""
    if key not in names:
        draft.problems.add(node, "should be fp32, fp16 or bf16 (bfloat16)")
        return
    draft.put("", "precision", replace(node, value=names[key]))


def read_zero(draft: Draft, node: Node) -> None:
    """Read ``zero_optimization: {stage, …}``."""
    for key, entry in draft.block(node).items():
        if key == "stage":
            if entry.value is not None:
                draft.put("zero", "stage", entry)
        elif key in ZERO_OFFLOAD:
            _put_offload(draft, key, entry)
        elif key in ZERO_OFFLOAD_FLAGS:
            _put_offload_flag(draft, ZERO_OFFLOAD_FLAGS[key], entry)
        elif key in ZERO_REFUSED:
            if not ZERO_REFUSED[key].agrees(entry.plain()):
                draft.problems.add(entry, f"refused: {ZERO_REFUSED[key].instead}")
        else:
            put_zero_option(draft, key, entry)


def put_zero_option(draft: Draft, key: str, node: Node) -> None:
    """Set one of the options that are handed to DeepSpeed, after checking its type."""
    value = node.value
    if value is None:
        return
    if key in ZERO_BOOLS:
        if not isinstance(value, bool):
            draft.problems.add(node, "should be true or false")
            return
    elif key in ZERO_SIZES:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            draft.problems.add(node, "should be a whole number of elements, at least 0")
            return
        if key in ("reduce_bucket_size", "allgather_bucket_size") and value == 0:
            draft.problems.add(node, "should be above 0")
            return
    else:
        known = ["stage", *ZERO_BOOLS, *ZERO_SIZES, *ZERO_OFFLOAD, *ZERO_REFUSED]
        unknown(draft, node, known, "key of zero_optimization")
        return
    draft.put("zero_options", key, replace(node, value=value))


def _put_offload(draft: Draft, key: str, node: Node) -> None:
    """Read ``{device: cpu, pin_memory: …}``; ``device: none`` is the default."""
    entries = dict(draft.block(node))
    device, pinned = entries.pop("device", None), entries.pop("pin_memory", None)
    for entry in entries.values():
        unknown(draft, entry, ("device", "pin_memory"), f"key of {key}")
    if pinned is not None and not isinstance(pinned.value, bool):
        draft.problems.add(pinned, "should be true or false")
        return
    if device is None or device.value in (None, "none"):
        return
    if device.value != "cpu":
        draft.problems.add(device, "should be cpu or none")
        return
    value: dict[str, Node] = {"device": device}
    if pinned is not None:
        value["pin_memory"] = pinned
    draft.put("zero_options", key, replace(node, value=value))


def _put_offload_flag(draft: Draft, key: str, node: Node) -> None:
    if node.value is True:
        draft.put("zero_options", key, node_of({"device": "cpu"}, node.mark, node.name))
    elif node.value not in (False, None):
        draft.problems.add(node, "should be true or false")
