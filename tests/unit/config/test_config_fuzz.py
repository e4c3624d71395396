"""Mutated configurations end in a ConfigError or in a valid Config, never in anything else."""

from __future__ import annotations

import json
import random
import re
import string

import pytest
import yaml

from megatron.config import Config, deepspeed_config, load_config
from megatron.config.canonical import accepted_keys, known_keys
from megatron.config.data import DomainConfig
from megatron.config.mixing import MixingConfig, option_names
from megatron.config.suggest import edit_distance, nearest
from megatron.errors import ConfigError
from megatron.registry import mixing_methods

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


def paths(tree: object, path: tuple = ()) -> list[tuple]:
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


def outcome(files, text: str, overrides: list[str]) -> Config | str:
    """Load; every valid configuration must also survive everything that is done with it."""
    try:
        config = files.load(text, overrides=overrides)
    except ConfigError as error:
        return str(error)
    again = load_config([files.write(config.resolved_yaml(), "resolved.yml")])
    assert again == config
    assert len(config.hash()) == 64
    json.dumps(deepspeed_config(config, 1, 1, 1))
    return config


def fuzz(files, cases: int, seed: int) -> tuple[int, int]:
    rng, valid = random.Random(seed), 0
    for case in range(cases):
        text, overrides = mutated(rng)
        try:
            valid += isinstance(outcome(files, text, overrides), Config)
        except Exception as error:
            raise AssertionError(f"case {case}: {error!r}\n{overrides}\n{text}") from error
    return valid, cases - valid


def test_base_is_valid(files):
    assert isinstance(outcome(files, RICH, []), Config)


def test_mutations_end_in_an_error_or_a_configuration(files):
    valid, refused = fuzz(files, 300, seed=1)
    assert valid > 20
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_many_mutations(files, seed):
    valid, refused = fuzz(files, 2_000, seed=seed)
    assert valid > 100
    assert refused > 800


def misspellings(rng: random.Random, names: list[str], count: int) -> list[tuple[str, str]]:
    """Return pairs (right, wrong), one edit apart, the wrong one not being a name itself."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        name = rng.choice(names)
        wrong = mutate_key(rng, name) if len(name) > 1 else name
        if wrong not in names and wrong and re.match(r"[a-z]", wrong):
            pairs.append((name, wrong))
    return pairs


def test_one_edit_is_recognised_in_at_least_95_percent():
    keys = known_keys()
    pairs = misspellings(random.Random(3), keys, 600)
    right = sum(nearest(wrong, keys) == name for name, wrong in pairs)
    assert right / len(pairs) >= 0.95, right / len(pairs)


def test_suggestions_reach_the_message(files):
    rng = random.Random(4)
    own = [key for key in accepted_keys() if key not in RICH.replace("-", "_")]
    pairs = misspellings(rng, own, 60)
    right = 0
    for name, wrong in pairs:
        message = outcome(files, RICH + f"{wrong}: 1\n", [])
        assert isinstance(message, str)
        assert ".yml:25: " in message
        right += f"did you mean '{name}'?" in message
    assert right / len(pairs) >= 0.95, right / len(pairs)


def test_suggestions_inside_blocks(files):
    rng = random.Random(5)
    odm = [*option_names(mixing_methods["odm"]), *(set(MixingConfig.model_fields) - {"options"})]
    right = total = 0
    for block, names in (
        ("mixing", sorted(odm)),
        ("domains.code", sorted(DomainConfig.model_fields)),
        ("optimizer.params", ["lr", "betas", "eps", "weight_decay"]),
        ("fp16", ["enabled", "loss_scale", "hysteresis", "min_loss_scale"]),
        ("zero_optimization", ["stage", "overlap_comm", "reduce_bucket_size"]),
    ):
        for name, wrong in misspellings(rng, names, 20):
            message = outcome(files, RICH, [f"{block}.{wrong}=1"])
            assert isinstance(message, str)
            right += f"did you mean '{name}'?" in message
            total += 1
    assert right / total >= 0.95, right / total


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("abc", "abc", 0), ("abc", "acb", 1), ("abc", "abd", 1), ("abc", "ab", 1), ("abc", "xabc", 1),
     ("abc", "cab", 2), ("a", "", 1), ("abcdef", "ghijkl", 4)],
)  # fmt: skip
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second, 3) == distance
    assert edit_distance(second, first, 3) == distance


def test_far_names_are_not_suggested():
    assert nearest("completely_else", known_keys()) is None
    assert nearest("LR", known_keys()) == "lr"
