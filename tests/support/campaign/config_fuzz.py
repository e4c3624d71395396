"""Mutated configurations, and misspelt keys."""

from __future__ import annotations

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import yaml

import megatron.mixing  # noqa: F401  (registers the methods)
from megatron.config import Config, deepspeed_config, load_config
from megatron.config.canonical import known_keys
from megatron.errors import ConfigError

RICH = """\
num_layers: 2
hidden-size: 64
num_attention_heads: 4
seq_length: 128
train_micro_batch_size_per_gpu: 4
gradient_accumulation_steps: 2
train_iters: 100
optimizer: {type: AdamW, params: {lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8}}
zero_optimization: {stage: 2, reduce_bucket_size: 5e8, overlap_comm: true}
fp16: {enabled: true, loss_scale: 0, hysteresis: 2}
domains:
  code: {train: data/code, valid: [v/code], weight: 1}
  prose: {train: [data/a, data/b], weight: 3}
mixing: {method: odm, smoothing_factor: 0.5, floor: {code: 0.1}, warmup_steps: 3, lag: 1}
lr_decay_style: cosine
warmup: 0.01
split: 90,5,5
extra_save_iters: [0, 1, 2]
comet_others: {a: [1, {b: c}]}
deepspeed_extra_args: {comms_logger: {enabled: false}}
on_nonfinite: skip(3)
attention_config: [[[flash], all]]
checkpoint_factor: 50
text_gen_type: unconditional
"""
VALUES = [
    "", "~", "true", "no", "0", "-1", "1", "3", "1.5", "1e-4", "1e400", "-.inf", ".nan", "9" * 30,
    "9" * 400, "1" * 5000, "x", "''", "odm", "[]", "{}", "[1, x]", "{a: 1}", "[[[]]]",
    "{a: {b: c}}",
    "2024-01-01", "0x10", "010", "&a [*a]", "*b", "!!python/none", "!!int 5", "!x 1", "'\\u0000'",
    "\"\\0\"", "{? [1] : 2}", "<<: 1", "{<<: {a: 1}}", "é", "\"a\\nb\"", "'1'", "[true, null]",
    "{stage: 1}", "{enabled: 1}", "{train: x}", "code", "stop", "schedule", "[.inf]", "- 1", "%",
]  # fmt: skip


def random_value(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(VALUES)
    return "".join(rng.choices(string.printable[:96], k=rng.randint(1, 12)))


def mutate_key(rng: random.Random, key: str) -> str:
    """Apply one edit: insert, delete, substitute or swap."""
    letters = string.ascii_lowercase + "_"
    spot = rng.randrange(len(key))
    kind = rng.choice(["insert", "delete", "substitute", "swap"])
    if kind == "insert":
        return key[:spot] + rng.choice(letters) + key[spot:]
    if kind == "delete":
        return key[:spot] + key[spot + 1 :]
    if kind == "substitute":
        return key[:spot] + rng.choice(letters.replace(key[spot], "")) + key[spot + 1 :]
    spot = min(spot, len(key) - 2)
    return key[:spot] + key[spot + 1] + key[spot] + key[spot + 2 :]


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += paths(value, (*path, key))
    return found


def mutated(rng: random.Random) -> tuple[str, list[str]]:
    """Return a mutated file and overrides."""
    text, overrides = RICH, []
    for _ in range(rng.randint(1, 3)):
        lines = text.splitlines(keepends=True)
        spot = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:  # another value of a key
            key = rng.choice([*known_keys(), *re.findall(r"^[\w-]+", text, re.M)])
            lines = [line for line in lines if line.split(":")[0] != key]
            lines.append(f"{key}: {random_value(rng)}\n")
        elif kind == 1:  # another value deep inside
            words = re.findall(r"[\w.-]+(?=[,}\]])", lines[spot])
            if words:
                lines[spot] = lines[spot].replace(rng.choice(words), random_value(rng), 1)
        elif kind == 2:  # misspelt key
            key = re.match(r"\s*([\w-]+)", lines[spot])
            if key and len(key.group(1)) > 1:
                bad = mutate_key(rng, key.group(1))
                lines[spot] = lines[spot].replace(key.group(1), bad, 1)
        elif kind == 3:  # duplicate
            lines.insert(rng.randrange(len(lines)), lines[spot])
        elif kind == 4:  # missing line
            del lines[spot]
        elif kind == 5:  # broken text
            at = rng.randrange(len(text))
            lines = [text[:at] + rng.choice("\t:{}[]&*!|>'\"%@`#,-\x00\ufffe") + text[at + 1 :]]
        elif kind == 6:
            tree = yaml.safe_load(RICH)
            keys = [str(part) for part in rng.choice(paths(tree))]
            overrides.append(f"{'.'.join(keys)}={random_value(rng)}")
        else:
            overrides.append(f"{rng.choice(known_keys())}={random_value(rng)}")
        text = "".join(lines)
    return text, overrides


def outcome(file: Path, text: str, overrides: list[str]) -> Config | str:
    """Load; every valid configuration must also survive everything that is done with it."""
    file.write_text(text, encoding="utf-8")
    try:
        config = load_config([str(file)], overrides=overrides)
    except ConfigError as error:
        return str(error)
    resolved = file.with_name("resolved.yml")
    resolved.write_text(config.resolved_yaml(), encoding="utf-8")
    again = load_config([str(resolved)])
    assert again == config
    assert len(config.hash()) == 64
    json.dumps(deepspeed_config(config, 1, 1, 1))
    return config


def misspellings(rng: random.Random, names: list[str], count: int) -> list[tuple[str, str]]:
    """Return pairs (right, wrong), one edit apart, the wrong one not being a name itself."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        name = rng.choice(names)
        wrong = mutate_key(rng, name) if len(name) > 1 else name
        if wrong not in names and wrong and re.match(r"[a-z]", wrong):
            pairs.append((name, wrong))
    return pairs
