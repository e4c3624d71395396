"""The resolved configuration as YAML that loads to an equal one."""

from __future__ import annotations

from typing import Any

import yaml

from megatron.config.config import FLAT_GROUPS, Config
from megatron.config.optimizers import KINDS
from megatron.config.source import scalar


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None if isinstance(scalar(value), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _yaml(data: dict[str, Any]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def _present(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not set: an absent key means the same."""
    return {key: value for key, value in data.items() if value is not None}


def resolved_yaml(config: Config) -> str:
    """Return the configuration as one YAML text, in sections."""
    data = config.model_dump(mode="json")
    sections: list[tuple[str, dict[str, Any]]] = [
        ("domains", {"domains": {k: _present(v) for k, v in data["domains"].items()}}),
        ("", {"split": data["split"]}),
        ("mixing", {"mixing": _mixing(data["mixing"])}),
        ("optimizer", _optimizer(data["optimizer"])),
        ("numbers", _numbers(data)),
        (
            "ZeRO",
            {"zero_optimization": {"stage": data["zero"]["stage"], **data["zero"]["options"]}},
        ),
    ]
    sections += [(group, _present(data[group])) for group in FLAT_GROUPS]
    if data["deepspeed"]:
        sections.append(("DeepSpeed", {"deepspeed_extra_args": data["deepspeed"]}))
    if data["ignored"]:
        sections.append(("without effect", {"keys_without_effect": data["ignored"]}))
    return "\n".join(
        (f"# {title}\n" if title else "") + _yaml(section) for title, section in sections if section
    )


def _mixing(mixing: dict[str, Any]) -> dict[str, Any]:
    options = mixing.pop("options")
    return {**_present(mixing), **options}


def _optimizer(optimizer: dict[str, Any]) -> dict[str, Any]:
    kind = KINDS[optimizer["type"]]
    # `adam` alone would be read as GPT-NeoX's, which is `adamw`.
    params = {key: optimizer[key] for key in ("lr", *kind.params)}
    if optimizer["type"] == "adam":
        params["adam_w_mode"] = False
    return {
        "optimizer": {"type": optimizer["type"], "params": params},
        **{key: optimizer[key] for key in ("weight_decay", "decay_embeddings")},
        "gradient_clipping": optimizer["gradient_clipping"],
    }


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"precision": data["precision"]}
    if data["precision"] == "fp16":
        numbers["fp16"] = data["fp16"]
    return numbers
