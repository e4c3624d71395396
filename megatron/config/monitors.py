"""Blocks of DeepSpeed's that say what keys of GPT-NeoX say, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron.config.draft import Draft
from megatron.config.node import Node
from megatron.config.suggest import did_you_mean

_WANDB = {"group": "wandb_group", "team": "wandb_team", "project": "wandb_project"}
_RECOMPUTATION = {"cpu_checkpointing": "checkpoint_in_cpu"}
_NO_RECOMPUTATION = {
    "partition_activations": "sequence_parallel divides what tensor ranks keep",
    "contiguous_memory_optimization": "torch's allocator keeps what is saved",
    "number_checkpoints": "blocks are counted by checkpoint_num_layers",
    "synchronize_checkpoint_boundary": "nothing waits for the device there",
    "profile": "wall_clock_breakdown takes times",
}


def read_tensorboard(draft: Draft, node: Node) -> None:
    """Read ``tensorboard: {enabled, output_path, job_name}``."""
    entries = _enabled(draft, node, ("output_path", "job_name"))
    if entries is None:
        return
    draft.put("logging", "use_tensorboard", entries["enabled"])
    parts = [entries[key] for key in ("output_path", "job_name") if _given(entries, key)]
    texts = [part.value for part in parts]
    if texts and all(isinstance(text, str) for text in texts):
        path = "/".join(str(text).rstrip("/") for text in texts)
        draft.put("logging", "tensorboard_dir", replace(parts[0], value=path))
    elif texts:
        draft.problems.add(parts[0], "should be the name of a folder")


def read_wandb(draft: Draft, node: Node) -> None:
    """Read ``wandb: {enabled, group, team, project}``."""
    entries = _enabled(draft, node, tuple(_WANDB))
    if entries is None:
        return
    draft.put("logging", "use_wandb", entries["enabled"])
    for key, field in _WANDB.items():
        if _given(entries, key):
            draft.put("logging", field, entries[key])


def read_activation_checkpointing(draft: Draft, node: Node) -> None:
    """Read ``activation_checkpointing``: where recomputed blocks keep their inputs."""
    for key, entry in draft.block(node).items():
        if key in _RECOMPUTATION:
            if entry.value is not None:
                draft.put("model", _RECOMPUTATION[key], entry)
        elif key in _NO_RECOMPUTATION:
            draft.ignore(entry.name, _NO_RECOMPUTATION[key])
        else:
            known = (*_RECOMPUTATION, *_NO_RECOMPUTATION)
            said = f"unknown key of activation_checkpointing{did_you_mean(key, known)}"
            draft.problems.add(entry, said, show=False)


def _enabled(draft: Draft, node: Node, known: tuple[str, ...]) -> Mapping[str, Node] | None:
    """Return a monitor's entries where it is switched on; report what is unknown."""
    entries = draft.block(node)
    for key, entry in entries.items():
        if key not in ("enabled", *known):
            said = f"unknown key of {node.name}{did_you_mean(key, known)}"
            draft.problems.add(entry, said, show=False)
    enabled = entries.get("enabled")
    if enabled is not None and not isinstance(enabled.value, bool):
        draft.problems.add(enabled, "should be true or false")
        return None
    return entries if enabled is not None and enabled.value else None


def _given(entries: Mapping[str, Node], key: str) -> bool:
    return key in entries and entries[key].value not in (None, "")
