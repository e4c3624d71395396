"""``neomix.json``: what of our model ``config.json`` cannot say, so that the way back is exact.

A bias that is not there is written as zeros, and keys that heads share are written once for
each head, where transformers' model has no other form.  The file names the model that it was;
it counts only where that model gives the very ``config.json`` beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.exchange.architecture import Architecture
from megatron.exchange.hf_config import hf_config, model_config, model_keys
from megatron.exchange.libraries import transformers

HINTS_NAME = "neomix.json"
_VERSION = 1


def write_hints(folder: Path, model: ModelConfig, *, step: int, precision: str) -> None:
    """Write the file.

    Args:
        folder: the Hugging Face folder.
        model: of ours.
        step: of its checkpoint.
        precision: that it was trained in.
    """
    content = {
        "version": _VERSION,
        "step": step,
        "precision": precision,
        "model": model.model_dump(mode="json"),
    }
    (folder / HINTS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_hints(folder: Path) -> dict[str, Any]:
    """Return what the file says; empty where there is none.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = folder / HINTS_NAME
    if not path.is_file():
        return {}
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        if content["version"] != _VERSION or not isinstance(content["model"], dict):
            raise ValueError(f"version {content['version']!r}")
        int(content["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); remove it to do without") from error
    return content


def original_model(
    hints: dict[str, Any], keys: dict[str, Any], architecture: Architecture, folder: Path
) -> ModelConfig | None:
    """Return the model that was written, if it is still the one that ``config.json`` describes.

    Args:
        hints: of :func:`read_hints`.
        keys: of ours, as read from ``config.json``.
        architecture: of the folder.
        folder: for messages.
    """
    if not hints:
        return None
    try:
        model = model_config(hints["model"], folder)
        kind = transformers("reading a folder").CONFIG_MAPPING[architecture.model_type]
        again = model_keys(kind.from_dict(hf_config(model, architecture)), folder)
    except (CheckpointError, KeyError):
        return None
    return model if again == keys else None
