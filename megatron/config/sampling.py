"""The online-data-mixing fork's ``data_sampling_*`` and ``mixed_*``, mapped onto ``mixing:``."""

from __future__ import annotations

from dataclasses import replace

from megatron.config.draft import Draft
from megatron.config.mixing import option_names
from megatron.config.node import Node
from megatron.registry import mixing_methods

_OPTIONS = {
    "data_sampling_warmup_steps": "warmup_steps",
    "data_sampling_update_frequency": "update_every",
    "data_sampling_smoothing_factor": "smoothing_factor",
}


_REWARD_OPTIONS = ("batch_normalized_reward", "scale_by_reward_loss_diff")


def map_sampling_keys(draft: Draft, keys: dict[str, Node]) -> None:
    """Set method, unit and options as the fork ran them.

    ``mixed_minibatches`` draws every micro-batch from one domain, ``mixed_batches`` every
    sample, neither of them a whole step; all three draw at random. Without
    ``data_sampling_method`` the weights stay as they are and the other keys have no effect.
    """
    keys = {key: node for key, node in keys.items() if node.value is not None}
    method = keys.pop("data_sampling_method", None)
    for key in ("mixed_batches", "mixed_minibatches"):
        if key in keys and not isinstance(keys[key].value, bool):
            draft.problems.add(keys[key], "should be true or false")
            return
    if method is None:
        for node in keys.values():
            if node.value is not False:
                draft.ignore(node.name, "belongs to data_sampling_method")
        return
    method = _rewarded(draft, keys, method)
    draft.put("mixing", "method", method)
    by_micro_batch, by_sample = keys.get("mixed_minibatches"), keys.get("mixed_batches")
    if by_micro_batch is not None and by_micro_batch.value:
        unit, source = "micro_batch", by_micro_batch
    elif by_sample is not None and by_sample.value:
        unit, source = "sample", by_sample
    else:
        unit, source = "step", method
    _default(draft, "unit", replace(source, value=unit))
    _default(draft, "draw", replace(source, value="multinomial"))
    name = method.value if isinstance(method.value, str) else ""
    known = option_names(mixing_methods[name]) if name in mixing_methods else []
    for key, option in _OPTIONS.items():
        if key not in keys:
            continue
        node = keys[key]
        if key == "data_sampling_update_frequency" and node.value == 0 and node.value is not False:
            node = replace(node, value=1)
        if option in known:
            draft.put("mixing", option, node)
        elif known:
            draft.ignore(node.name, f"the method '{name}' has no such option")
    if "pool" in known and "data_sampling_update_frequency" in keys:
        _default(draft, "pool", replace(keys["data_sampling_update_frequency"], value=False))


def _rewarded(draft: Draft, keys: dict[str, Node], method: Node) -> Node:
    """Return the method that learns from the reward which the fork's switches choose."""
    asked = keys.pop("validation_based_reward", None)
    details = {key: keys.pop(key) for key in _REWARD_OPTIONS if key in keys}
    for node in (asked, *details.values()):
        if node is not None and not isinstance(node.value, bool):
            draft.problems.add(node, "should be true or false")
            return method
    if asked is None or not asked.value or method.value == "naive_validation":
        for node in details.values():
            if node.value:
                draft.ignore(node.name, "belongs to validation_based_reward with exp3")
        return method
    if method.value != "exp3":
        draft.problems.add(
            asked,
            f"refused: the method '{method.value}' has no such reward, and stops in the fork; use "
            "data_sampling_method: exp3 (which becomes validation_gap) or naive_validation",
            show=False,
        )
        return method
    for key, node in details.items():
        draft.put("mixing", key, node)
    return replace(method, value="validation_gap")


def _default(draft: Draft, name: str, node: Node) -> None:
    """Set a key of ``mixing:`` unless the user did."""
    if draft.get("mixing", name) is None:
        draft.put("mixing", name, node)
