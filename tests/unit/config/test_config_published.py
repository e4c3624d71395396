"""The keys and values of the YAML files that GPT-NeoX and its fork publish.

``neox_values.json`` holds by system every key of those files with each of its values (paths are
shortened). None may be unknown: it gives a configuration, or is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.errors import ConfigError

VALUES: dict[str, dict[str, list]] = json.loads(
    (Path(__file__).parent / "neox_values.json").read_text()
)
PREFERENCES = {
    f"{side}_{part}_{kind}_paths"
    for side in ("pos", "neg")
    for part in ("train", "valid", "test")
    for kind in ("data", "label_data")
} | {f"{part}_reward_data_paths" for part in ("train", "valid", "test")}
# What the published files ask for and is refused, with a reason that names the alternative.
REFUSED = PREFERENCES | {
    "attention_config",  # Mamba and RWKV
    "attention_type",  # unknown to GPT-NeoX too
    "dataset_impl",
    "decay_lr_to",  # unknown to GPT-NeoX too
    "serve_model_weights",
    "te_layernorm_mlp",
    "te_mha",
    "train_impl",
}
# Two spellings of one setting: the base configuration's own is left out.
REPLACES = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "data_path": "domains",
    "train_data_paths": "domains",
}


@pytest.mark.parametrize("system", VALUES)
def test_every_published_value_is_accepted_or_refused_by_name(load, system):
    said: dict[str, list[str]] = {}
    for key, values in VALUES[system].items():
        for value in values:
            try:
                load(f"{key}: {json.dumps(value)}\n", without=(key, REPLACES.get(key, key)))
            except ConfigError as error:
                said.setdefault(key, []).append(str(error))
    unknown = [key for key, texts in said.items() if any("unknown key" in t for t in texts)]
    assert unknown == []
    nameless = [text for key, texts in said.items() for text in texts if key not in text]
    assert nameless == []
    assert {key for key, texts in said.items() if any("refused" in t for t in texts)} <= REFUSED
