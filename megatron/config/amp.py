"""The block ``amp`` of apex's mixed precision, which became torch's and DeepSpeed's own."""

from __future__ import annotations

from dataclasses import replace

from megatron.config.draft import Draft
from megatron.config.node import Node
from megatron.config.suggest import did_you_mean

_LEVELS = {"o0": "fp32", "o1": "fp16", "o2": "fp16", "o3": "fp16"}
_SCALING = {"loss_scale": "loss_scale", "min_loss_scale": "min_loss_scale"}
_DETAILS = (
    "cast_model_type",
    "patch_torch_functions",
    "keep_batchnorm_fp32",
    "master_weights",
    "max_loss_scale",
    "cast_model_outputs",
    "num_losses",
    "verbosity",
    "enabled",
    "opt_level",
)


def read_amp(draft: Draft, node: Node) -> None:
    """Read ``amp: {enabled, opt_level, loss_scale, …}``: fp16 with fp32 masters, or fp32.

    That is what apex's level O2 is. O1 casts call by call, and O3 has no masters; both are run as
    O2, whose sums are no less exact.
    """
    entries = draft.block(node)
    for key, entry in entries.items():
        if key not in (*_SCALING, *_DETAILS):
            known = (*_SCALING, *_DETAILS)
            draft.problems.add(entry, f"unknown key of amp{did_you_mean(key, known)}", show=False)
    enabled = entries.get("enabled")
    if enabled is None or not isinstance(enabled.value, bool):
        draft.problems.add(enabled or node, "needs enabled: true or false")
        return
    if not enabled.value:
        return
    level = entries.get("opt_level")
    name = "O1" if level is None or level.value is None else str(level.value)
    if name.lower() not in _LEVELS:
        assert level is not None
        draft.problems.add(level, "should be O0, O1, O2 or O3")
        return
    place = level or enabled
    draft.put("", "precision", replace(place, value=_LEVELS[name.lower()]))
    if name.lower() in ("o1", "o3"):
        draft.ignore(f"amp.opt_level: {name}", "run as O2: weights in fp16, their masters in fp32")
    for key, field in _SCALING.items():
        given = entries.get(key)
        if given is not None and given.value not in (None, "dynamic"):
            draft.put("fp16", field, given)
    for key in _DETAILS:
        if key not in ("enabled", "opt_level") and key in entries:
            draft.ignore(entries[key].name, "a detail of apex, which is not used")
