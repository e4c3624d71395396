"""Models with random weights, and checkpoints of them in the files that layouts leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from support.bundles import write_bundle

import megatron.mixing  # noqa: F401
from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config, ModelConfig, load_config
from megatron.exchange.weights import parameters, partition_of, true_shape
from megatron.training.compatible import facts_of

VOCABULARY = 97
REST = {
    "train_iters": 4,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "domains": {"none": {"train": "none"}},
}
NEOX = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 8,
    "intermediate_size": 48,
}
LLAMA = {
    **NEOX,
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-6,
    "activation": "swiglu",
    "num_kv_heads": 2,
    "no_weight_tying": True,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}


class Held:
    """Weights that are held in a dictionary."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def config(folder: Path, keys: Mapping[str, Any]) -> Config:
    """Write a run's configuration, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump({**REST, "run_dir": str(folder), **keys}))
    return load_config([str(file)])


def random_weights(model: ModelConfig, seed: int = 0) -> Held:
    """Return weights large enough that every one of them moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in parameters(model).items():
        value = torch.randn(true_shape(parameter), generator=generator) * 0.3
        norm = name.endswith(("layernorm.weight", "norm.weight", ".scale"))
        found[name] = value + 1 if norm else value
    return Held(found)


def save(
    folder: Path,
    keys: Mapping[str, Any],
    weights: Held,
    *,
    tensor: int = 1,
    pipeline: bool = False,
    step: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a run's folder with one checkpoint in the files that DeepSpeed writes."""
    settings = config(folder, keys)
    model = settings.model
    store = CheckpointStore(folder / "checkpoints")
    temporary = store.begin(step)
    files = [
        write_bundle(temporary, step=step, domains=["none"], planner={}, guard={}),
        *_files(temporary, model, weights, tensor=tensor, pipeline=pipeline, dtype=dtype),
    ]
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    store.commit(
        step,
        store.seal_files(files),
        layout={
            "data_size": 1,
            "tensor_size": tensor,
            "pipe_size": 2 if pipeline else 1,
            "zero_stage": 1,
            "precision": precision,
        },
        extra={"model": facts_of(model)},
    )
    return folder


def _files(
    folder: Path,
    model: ModelConfig,
    weights: Held,
    *,
    tensor: int,
    pipeline: bool,
    dtype: torch.dtype,
) -> list[Path]:
    described = parameters(model)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in described.items():
        partition = partition_of(parameter)
        full = weights.read(name).to(dtype)
        if partition is not None and partition.padded_from is not None:
            rows = model.padded_vocab_size(tensor)
            padded = full.new_zeros(rows, full.shape[1])
            padded[: full.shape[0]] = full
            parts = list(padded.chunk(tensor))
        elif partition is None:
            parts = [full] * tensor
        else:
            parts = [partition.part(full, rank, tensor) for rank in range(tensor)]
        for rank, part in enumerate(parts):
            file, key = f"mp_rank_{rank:02d}_model_states.pt", name
            if pipeline:
                layer, key = (
                    ("0", name.split(".", 2)[2])
                    if name.startswith("tied_modules")
                    else name.split(".", 1)
                )
                file = f"layer_{int(layer):02d}-model_{rank:02d}-model_states.pt"
            files.setdefault(file, {})[key] = part.clone()
    for file, content in files.items():
        torch.save(content if pipeline else {"module": content, "iteration": 7}, folder / file)
    return [folder / file for file in files]
