"""The reference of all configuration keys, as Markdown: made from the types, never by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from megatron.config.blocks import ZERO_BOOLS, ZERO_REFUSED, ZERO_SIZES
from megatron.config.config import FLAT_GROUPS
from megatron.config.data import DomainConfig
from megatron.config.mixing import MixingConfig, option_model
from megatron.config.neox import REFUSED, WITHOUT_EFFECT
from megatron.config.optimisation import LossScaleConfig, OptimizerConfig
from megatron.config.optimizers import OPTIMIZER_PARAMS
from megatron.config.schema import MAPPED, properties, properties_of_config
from megatron.config.system import ZeroConfig
from megatron.registry import mixing_methods

_TITLES = {
    "model": "Model",
    "schedule": "Learning rate",
    "batch": "Batch",
    "data": "Data",
    "training": "Training",
    "checkpoint": "Run folder and checkpoints",
    "logging": "Logging",
    "tokenizer": "Tokenizer",
    "parallel": "Layout",
    "launch": "Launch",
    "evaluation": "Evaluation by tasks",
    "generation": "Generation",
}
_INTRODUCTION = """\
# Configuration reference

<!-- Written by tools/generate_docs.py from the types in megatron/config; do not edit. -->

A run is described by one or more YAML files in GPT-NeoX's style, merged in any order:

```bash
./deepy.py train.py -d configs models/160m data/pile mixing/odm parallel/bf16 --set train_iters=1000
```

- `.yml` may be left out; `-d DIR` is the folder that names start from.
- Keys may be written with `-` or `_`. A fixed choice may be written in any case. `1e-4` is a
  number, and so is `1e6` where a whole number is wanted.
- Blocks (`domains`, `mixing`, `optimizer`, …) are merged key by key. The same key with two
  different values is an error that names both places; so is a key written twice in a file.
- `--set key=value` wins over the files; a dotted key reaches into a block
  (`--set optimizer.params.lr=1e-4`), the value is YAML, and `null` gives back the default.
- An unknown key, a value of the wrong type or out of its range is an error with file, line,
  value and the nearest known name. Nothing is silently ignored: known keys of GPT-NeoX without
  effect are listed when a run starts.
- `./deepy.py --print-config …` prints the resolved configuration, which is a valid file itself;
  `--check` also opens everything that the run would.

`docs/schema.json` is the same reference as a JSON Schema for editors: begin a file with
`# yaml-language-server: $schema=PATH/docs/schema.json`.

Keys without a default in the tables below are required.
"""
_EXAMPLE = """\
```yaml
domains:
  code: {train: data/code/train_text_document, valid: data/code/valid_text_document, weight: 0.4}
  prose: {train: [data/books_text_document, data/web_text_document], weight: 0.6}
mixing: {method: odm, draw: multinomial, smoothing_factor: 0.9}
```
"""


def reference() -> str:
    """Return the whole reference. The mixing methods must have been registered."""
    top = properties_of_config()
    parts = [
        _INTRODUCTION,
        "## Domains and mixture\n",
        _EXAMPLE,
        "### `domains: {NAME: {…}}`\n",
        _table(DomainConfig),
        _rows({"split": top["split"]}, set()),
        "### `mixing: {…}`\n",
        _mixing(),
        _methods(),
        "## Optimizer and numbers\n",
        "### `optimizer: {type, params: {…}}`\n",
        _optimizer(),
        "### `precision`, `fp16: {enabled, …}`, `bf16: {enabled}`\n",
        _rows({"precision": top["precision"]}, set()),
        "Under `fp16: {enabled: true}`, which is the same as `precision: fp16`:\n",
        _table(LossScaleConfig),
        "### `zero_optimization: {stage, …}`\n",
        _zero(),
        "### `deepspeed_extra_args: {…}`\n",
        str(top["deepspeed"]["description"]) + " Batch sizes, precision, clipping, optimizer and "
        "schedule have keys of their own and are refused there.\n",
    ]
    for group, model in FLAT_GROUPS.items():
        parts += [f"## {_TITLES[group]}\n", _table(model)]
    return "\n".join([*parts, _neox()])


def _mixing() -> str:
    fields = properties(MixingConfig)
    del fields["options"]
    fields["method"]["enum"] = sorted(mixing_methods)
    return _rows(fields, set())


def _methods() -> str:
    """Document every mixing method; options that all have come first, once."""
    models = {name: option_model(mixing_methods[name]) for name in sorted(mixing_methods)}
    common = set.intersection(*(set(model.model_fields) for model in models.values()))
    first = next(iter(models.values()))
    parts = [
        "Options of every method, written beside the keys above:\n",
        _table(first, only=common),
    ]
    for name, model in models.items():
        needs = ", ".join(sorted(mixing_methods[name].needs)) or "nothing"
        parts.append(f"#### `method: {name}`\n\nObserves: {needs}.\n")
        if set(model.model_fields) - common:
            parts.append(_table(model, leave_out=common))
    return "\n".join(parts)


def _optimizer() -> str:
    fields = properties(OptimizerConfig)
    fields["type"]["enum"] = ["AdamW", "Adam", "Adam8bit", "Lion", "SGD", "SM3", "madgrad_wd"]
    fields["type"]["default"] = "AdamW"
    names = {key: f"params.{key}" for key in ("lr", "weight_decay", *OPTIMIZER_PARAMS)}
    shown = {names.get(key, key): schema for key, schema in fields.items()}
    shown["params.adam_w_mode"] = {
        "type": "boolean",
        "default": True,
        "description": "False: weight decay is added to the gradient.",
    }
    note = "`lr`, `weight_decay` and `gradient_clipping` may also stand outside the block.\n"
    for key in ("gradient_clipping", "decay_embeddings"):
        shown[f"{key} (outside the block)"] = shown.pop(key)
    return _rows(shown, {"params.lr"}) + "\n" + note


def _zero() -> str:
    stage = _rows({"stage": properties(ZeroConfig)["stage"]}, set())
    passed = ", ".join(f"`{key}`" for key in (*ZERO_BOOLS, *ZERO_SIZES))
    refused = "".join(f"| `{key}` | {value.instead} |\n" for key, value in ZERO_REFUSED.items())
    return (
        f"{stage}\nHanded to DeepSpeed as they are: {passed}.\n\n"
        "`offload_optimizer: {device: cpu, pin_memory: true}` keeps the optimizer's state in the "
        "host's memory\nand updates it there; `offload_param: {device: cpu}` (stage 3) the "
        "parameters too.\n\n"
        f"| refused | instead |\n|---|---|\n{refused}"
    )


def _table(
    model: type[BaseModel], *, only: set[str] | None = None, leave_out: set[str] | None = None
) -> str:
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    shown = {
        name: schema
        for name, schema in properties(model).items()
        if (only is None or name in only) and name not in (leave_out or set())
    }
    return _rows(shown, required)


def _rows(fields: dict[str, Any], required: set[str]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, schema in _with_blocks(fields):
        default = "" if name in required else _default(schema.get("default"))
        meaning = str(schema.get("description", "")).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{name}` | {_type(schema)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _with_blocks(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield fields by name; one that is a block is followed by its own, under dotted names."""
    for name, schema in fields.items():
        block = _block(schema)
        if not block:
            yield name, schema
            continue
        whole = schema.get("default")
        yield name, {**schema, "default": "as below" if isinstance(whole, dict) else whole}
        for inner, own in _with_blocks(block):
            yield f"{name}.{inner}", own


def _block(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a schema that is a block, or may be one; empty = it is none."""
    if "properties" in schema:
        return dict(schema["properties"])
    return next(filter(None, map(_block, schema.get("anyOf", ()))), {})


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str) and not (value and value.isprintable()):
        return f"`{json.dumps(value)}`"
    return f"`{value}`"


def _type(schema: dict[str, Any]) -> str:
    """Say in words what a schema accepts."""
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        parts = [_type(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        if isinstance(items, list):
            return f"list of {len(items)}: {_type(items[0])}"
        return f"list of {_type(items)}" if items else "list"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` \\| `false`",
        "string": "text",
        "object": "block",
    }
    if kind == "string" and "pattern" in schema:
        return "`stop` \\| `skip(k)`"
    return words.get(str(kind), "any") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in signs.items()
        if key in schema and abs(schema[key]) < 2**53
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _neox() -> str:
    mapped = "".join(f"| `{key}` | {text} |\n" for key, text in MAPPED.items())
    refused = "".join(f"| `{key}` | {refusal.instead} |\n" for key, refusal in REFUSED.items())
    reasons: dict[str, list[str]] = {}
    for key, reason in WITHOUT_EFFECT.items():
        reasons.setdefault(reason, []).append(f"`{key}`")
    ignored = "".join(f"| {reason} | {', '.join(keys)} |\n" for reason, keys in reasons.items())
    return (
        "## Keys of GPT-NeoX and of its online-data-mixing fork\n\n"
        "Every other key of theirs is one of the above.\n\n"
        f"### Other names\n\n| key | becomes |\n|---|---|\n{mapped}\n"
        "### Refused, unless switched off\n\n"
        f"These could change results.\n\n| key | instead |\n|---|---|\n{refused}\n"
        f"### Without effect, and listed at start\n\n| why | keys |\n|---|---|\n{ignored}"
    )
