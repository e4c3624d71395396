"""The JSON Schema of a configuration file, for editors: made from the types, never by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from megatron.config.blocks import (
    ZERO_BOOLS,
    ZERO_OFFLOAD,
    ZERO_OFFLOAD_FLAGS,
    ZERO_REFUSED,
    ZERO_SIZES,
)
from megatron.config.canonical import IGNORED_KEY
from megatron.config.config import FLAT_GROUPS, Config
from megatron.config.data import DomainConfig
from megatron.config.mixing import MixingConfig, option_model
from megatron.config.neox import ALIASES, REFUSED, WITHOUT_EFFECT, ZERO_ALIASES, Refusal
from megatron.config.optimisation import LossScaleConfig, OptimizerConfig
from megatron.config.optimizers import NAMES, OPTIMIZER_PARAMS
from megatron.config.system import ZeroConfig
from megatron.registry import mixing_methods

Schema = dict[str, Any]
DRAFT = "http://json-schema.org/draft-07/schema#"


def properties(model: type[BaseModel]) -> dict[str, Schema]:
    """Return the schemas of a group's fields by name, without pydantic's titles."""
    whole = model.model_json_schema()
    found, blocks = whole["properties"], whole.get("$defs", {})
    return {name: _tidy(schema, blocks) for name, schema in found.items()}


def _tidy(schema: Any, blocks: dict[str, Schema]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:  # a block of options: written out where it stands
            own = blocks[schema["$ref"].rpartition("/")[2]]
            schema = {**own, **{key: value for key, value in schema.items() if key != "$ref"}}
        fields = schema.get("properties", {})
        kept = {
            key: _tidy(value, blocks)
            for key, value in schema.items()
            if key not in ("title", "properties")
        }
        if fields:
            kept["properties"] = {name: _tidy(field, blocks) for name, field in fields.items()}
            kept |= _hyphens(fields)
        if "prefixItems" in kept:  # draft-07 spells a tuple this way
            kept["items"] = kept.pop("prefixItems")
        if isinstance(kept.get("description"), str):
            kept["description"] = " ".join(kept["description"].split())
        return kept
    return [_tidy(entry, blocks) for entry in schema] if isinstance(schema, list) else schema


def _hyphens(fields: dict[str, Schema]) -> dict[str, Schema]:
    """Return what lets a block's keys be written with hyphens."""
    patterns: Schema = {f"^{key.replace('_', '[-_]')}$": {} for key in fields if "_" in key}
    return {"patternProperties": patterns} if patterns else {}


def _block(fields: dict[str, Schema], description: str) -> Schema:
    return {
        "type": "object",
        "description": description,
        "properties": fields,
        "additionalProperties": False,
    }


def json_schema() -> Schema:
    """Return the schema of one file (which need not be complete: files are merged).

    The mixing methods must have been registered.
    """
    keys: dict[str, Schema] = {}
    for group in FLAT_GROUPS.values():
        keys.update(properties(group))
    keys.update(_blocks())
    keys.update(_mapped_keys(keys))
    keys.update({key: _refused(refusal) for key, refusal in REFUSED.items()})
    for key, reason in WITHOUT_EFFECT.items():
        keys[key] = {"description": f"Without effect: {reason}.", "deprecated": True}
    hyphens = {
        f"^{key.replace('_', '[-_]')}$": {"$ref": f"#/properties/{key}"}
        for key in keys
        if "_" in key
    }
    return {
        "$schema": DRAFT,
        "title": "neomix configuration",
        "type": "object",
        "properties": keys,
        "patternProperties": hyphens,
        "additionalProperties": False,
    }


def _blocks() -> dict[str, Schema]:
    optimizer = properties(OptimizerConfig)
    names = ["Adam", "AdamW", "Lion", "SGD", "SM3", "CPU_Adam", "CPU_torch_Adam", *NAMES]
    params = {key: optimizer[key] for key in ("lr", "weight_decay", *OPTIMIZER_PARAMS)}
    params["adam_w_mode"] = {
        "type": "boolean",
        "default": True,
        "description": "False: weight decay is added to the gradient.",
    }
    top = properties_of_config()
    return {
        "optimizer": _block(
            {"type": {"enum": names}, "params": _block(params, "Parameters of the optimizer.")},
            "The optimizer.",
        ),
        "precision": {**top["precision"], "enum": ["fp32", "fp16", "bf16", "bfloat16"]},
        "fp16": _block(
            {
                "enabled": {"type": "boolean"},
                "fp16": {"description": "Without effect."},
                "type": {"enum": ["fp16", "bfloat16"]},
                "auto_cast": {"description": "Without effect."},
                **properties(LossScaleConfig),
            },
            "Half precision with loss scaling.",
        ),
        "bf16": _block({"enabled": {"type": "boolean"}}, "bfloat16."),
        "zero_optimization": _zero(),
        "domains": {
            "type": "object",
            "description": "What is trained on: one block per domain, by its name.",
            "additionalProperties": _block(properties(DomainConfig), "One domain."),
        },
        "split": top["split"],
        "mixing": _mixing(),
        "deepspeed_extra_args": {"type": "object", "description": top["deepspeed"]["description"]},
        IGNORED_KEY: {
            "type": "array",
            "items": {"type": "string"},
            "description": "Written into a resolved configuration: the keys that have no effect.",
        },
    }


def properties_of_config() -> dict[str, Schema]:
    """Return the schemas of the whole configuration's own fields."""
    return {
        name: schema
        for name, schema in properties(Config).items()
        if name in ("precision", "split", "deepspeed", "ignored")
    }


def _zero() -> Schema:
    fields: dict[str, Schema] = {"stage": properties(ZeroConfig)["stage"]}
    fields |= {key: {"type": "boolean"} for key in ZERO_BOOLS}
    fields |= {key: {"type": "integer", "minimum": 0} for key in ZERO_SIZES}
    place: dict[str, Schema] = {
        "device": {"enum": ["cpu", "none"]},
        "pin_memory": {"type": "boolean"},
    }
    fields |= {key: _block(place, "What is kept in the host's memory.") for key in ZERO_OFFLOAD}
    fields |= {key: {"type": "boolean"} for key in ZERO_OFFLOAD_FLAGS}
    fields |= {key: _refused(refusal) for key, refusal in ZERO_REFUSED.items()}
    return _block(fields, "DeepSpeed's ZeRO.")


def _mixing() -> Schema:
    own = {key: schema for key, schema in properties(MixingConfig).items() if key != "options"}
    own["method"] = {**own["method"], "enum": list(mixing_methods)}
    numbers = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
    own["weights"] = {
        "description": own["weights"]["description"],
        "anyOf": [*own["weights"]["anyOf"], numbers],
    }
    options: dict[str, Schema] = {}
    rules = []
    for name in mixing_methods:
        fields = properties(option_model(mixing_methods[name]))
        options |= {key: {"description": f.get("description", "")} for key, f in fields.items()}
        rules.append(
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {
                    "properties": fields,
                    "propertyNames": {
                        "enum": sorted({s for key in (*own, *fields) for s in _spellings(key)})
                    },
                },
            }
        )
    block = _block({**own, **options}, "How the mixture is decided.")
    block["patternProperties"] = {
        f"^{key.replace('_', '[-_]')}$": {} for key in (*own, *options) if "_" in key
    }
    return {**block, "allOf": rules}


def _spellings(key: str) -> set[str]:
    return {key, key.replace("_", "-")}


def _mapped_keys(keys: dict[str, Schema]) -> dict[str, Schema]:
    """Return the keys of GPT-NeoX and its fork that are mapped onto ours."""
    optimizer, scaling = properties(OptimizerConfig), properties(LossScaleConfig)
    zero = keys["zero_optimization"]["properties"]
    pools = {"optimizer": optimizer, "fp16": scaling, "zero": zero, "batch": keys}
    pools |= {"schedule": keys, "checkpoint": keys, "model": keys}
    paths: Schema = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    weights: Schema = {"type": "array", "items": {"type": "number", "minimum": 0}}
    flag: Schema = {"type": "boolean"}
    steps: Schema = {"type": "integer", "minimum": 0}
    mapped: dict[str, Schema] = {
        **{key: pools[group][field] for key, (group, field) in ALIASES.items()},
        **{key: zero[option] for key, option in ZERO_ALIASES.items()},
        **{f"{part}_data_paths": paths for part in ("train", "valid", "test")},
        **{f"{part}_data_weights": weights for part in ("train", "valid", "test")},
        **{f"{part}_label_data_paths": paths for part in ("train", "valid", "test")},
        "optimizer_type": keys["optimizer"]["properties"]["type"],
        "use_bnb_optimizer": flag,
        "data_path": {"type": "string"},
        "weight_by_num_documents": flag,
        "weighted_sampler_alpha": {"type": "number", "minimum": 0},
        "use_named_train_datasets": flag,
        "use_named_eval_datasets": flag,
        "data_sampling_method": {"enum": list(mixing_methods)},
        "data_sampling_warmup_steps": steps,
        "data_sampling_update_frequency": steps,
        "data_sampling_smoothing_factor": {"type": "number"},
        "mixed_batches": flag,
        "mixed_minibatches": flag,
        "bias_gelu_fusion": flag,
        "num_unique_layers": {"type": "integer", "minimum": 1},
        "validation_based_reward": flag,
        "batch_normalized_reward": flag,
        "scale_by_reward_loss_diff": flag,
        "data_types": {"type": "object"},
        "fp32_allreduce": flag,
        "amp": {"type": "object"},
        "tensorboard": {"type": "object"},
        "wandb": {"type": "object"},
        "activation_checkpointing": {"type": "object"},
        "decay_lr_to": {"type": "number", "minimum": 0, "maximum": 1},
        "deepspeed_mpi": flag,
        "deepspeed_slurm": flag,
    }
    return {
        key: {"description": MAPPED.get(key, "Another name."), **schema}
        for key, schema in mapped.items()
    }


MAPPED: dict[str, str] = {
    "lr": "`optimizer: {params: {lr}}`",
    "weight_decay": "`optimizer: {params: {weight_decay}}`",
    "gradient_clipping": "Largest norm of the whole gradient; 0 = no clipping.",
    "clip_grad": "`gradient_clipping`",
    "batch_size": "`train_micro_batch_size_per_gpu`",
    "gas": "`gradient_accumulation_steps`",
    "loss_scale": "`fp16: {loss_scale}`",
    "zero_stage": "`zero_optimization: {stage}`",
    "optimizer_type": "`optimizer: {type}`",
    "use_bnb_optimizer": "`optimizer: {type: Adam8bit}`",
    "decay_embeddings": "Whether input and output embeddings decay, as in GPT-NeoX.",
    "lr_end": "`min_lr`",
    "save_iters": "`extra_save_iters`",
    "num_experts": "`moe_num_experts`",
    "expert_interval": "`moe_expert_interval`",
    "moe_aux_loss_coeff": "`moe_loss_coeff`",
    "data_path": "one domain under `domains`, cut by `split`",
    "train_data_paths": "domains, named by file (or folder, where file names say nothing)",
    "valid_data_paths": "`valid` of the domains, matched by name, else by place in the list; "
    "what is nobody's is a target, which is only measured",
    "test_data_paths": "`test` of the domains, likewise",
    "train_data_weights": "`weight` of the domains (1 each when not given)",
    "valid_data_weights": "`valid_weight` of the domains: weights of the averages",
    "test_data_weights": "`test_weight` of the domains, likewise",
    "train_label_data_paths": "`train_labels` of the domains, in the order of the paths",
    "valid_label_data_paths": "`valid_labels` of the domains, likewise",
    "test_label_data_paths": "`test_labels` of the domains, likewise",
    "weight_by_num_documents": "`mixing: {weights: documents}`",
    "weighted_sampler_alpha": "`mixing: {weights_alpha}`, with `weight_by_num_documents`",
    "use_named_train_datasets": "domains are named by the folder that a path lies in",
    "use_named_eval_datasets": "likewise",
    "data_sampling_method": "`mixing: {method}`",
    "data_sampling_warmup_steps": "`mixing: {warmup_steps}`",
    "data_sampling_update_frequency": "`mixing: {update_every, pool: false}`; 0 = 1",
    "data_sampling_smoothing_factor": "`mixing: {smoothing_factor}`",
    "mixed_batches": "`mixing: {unit: sample, draw: multinomial}`",
    "mixed_minibatches": "`mixing: {unit: micro_batch, draw: multinomial}`",
    "bias_gelu_fusion": "`activation: gelu_tanh`, which is what the fused kernel computes",
    "num_unique_layers": "checked to divide `num_layers`; layers share no weights, as in theirs",
    "validation_based_reward": "`mixing: {method: validation_gap}`, with `exp3`",
    "batch_normalized_reward": "`mixing: {batch_normalized_reward}` of `validation_gap`",
    "scale_by_reward_loss_diff": "`mixing: {scale_by_reward_loss_diff}` of `validation_gap`",
    "data_types": "`deepspeed_extra_args: {data_types}`",
    "fp32_allreduce": "`communication_data_type: fp32`",
    "tensorboard": "`use_tensorboard` and `tensorboard_dir: OUTPUT_PATH/JOB_NAME`",
    "wandb": "`use_wandb`, `wandb_group`, `wandb_team` and `wandb_project`",
    "activation_checkpointing": "`cpu_checkpointing` is `checkpoint_in_cpu`; the others have no "
    "effect",
    "decay_lr_to": "`min_lr`, as a share of the peak learning rate",
    "amp": "`precision: fp16` with fp32 masters (apex's O2; O1 and O3 are run as that), or `fp32` "
    "for O0; `loss_scale` and `min_loss_scale` go into the block `fp16`",
    "deepspeed_mpi": "`launcher: openmpi`",
    "deepspeed_slurm": "`launcher: slurm`",
    "zero_reduce_scatter": "`zero_optimization: {reduce_scatter}`",
    "zero_contiguous_gradients": "`zero_optimization: {contiguous_gradients}`",
    "zero_reduce_bucket_size": "`zero_optimization: {reduce_bucket_size}`",
    "zero_allgather_bucket_size": "`zero_optimization: {allgather_bucket_size}`",
}


def _refused(refusal: Refusal) -> Schema:
    """Accept only the values that agree with what happens anyway."""
    values: list[Any] = [None, False, "", [], {}] if refusal.off else [None]
    values += [value for value in refusal.neutral if value not in values]
    return {
        "description": f"Refused: {refusal.instead}.",
        "deprecated": True,
        "anyOf": [
            {"enum": values},
            {
                "type": "object",
                "properties": {"enabled": {"const": False}},
                "required": ["enabled"],
            },
        ],
    }
