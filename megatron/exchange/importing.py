"""Writing weights from elsewhere as a checkpoint of ours that any layout can start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from megatron.checkpoint.files import disk_errors
from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config, ModelConfig, load_config
from megatron.exchange.weights import UniversalWeights, Weights, parameters, true_shape
from megatron.training.compatible import IMPORTED, NOT_ARCHITECTURE
from megatron.training.conversion import UNIVERSAL

MODEL_NAME = "model.yml"
_CONFIG_NAME = "config.yml"
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model from elsewhere.

    Attributes:
        model: in our keys.
        weights: its parameters.
        origin: where it comes from, for people.
        step: training steps that it has had, as far as known.
        precision: number format that it is kept in there.
        tokenizer: our keys of its tokenizer; files relative to the output folder.
    """

    model: ModelConfig
    weights: Weights
    origin: str
    step: int
    precision: str
    tokenizer: Mapping[str, str]


def precision_of(dtype: torch.dtype) -> str:
    """Return our name of a number format (fp32 for what we have no name of)."""
    return _PRECISION.get(dtype, "fp32")


def write_checkpoint(
    imported: Imported,
    folder: Path,
    final: Path,
    *,
    check: Callable[[Weights], None],
) -> Path:
    """Write a checkpoint of weights alone, and the configuration of its model beside it.

    It is in the universal format: one file for each whole parameter, in float32.

    Args:
        imported: what is written.
        folder: (temporary) folder for it.
        final: what the folder will be called; written into the configuration.
        check: called with the weights as they can be read back, before the checkpoint counts.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: from ``check``.
        RunError: the disk refuses.
    """
    model = imported.model
    files, wanted = CheckpointStore(folder), parameters(model)
    needed = sum(4 * parameter.numel() for parameter in wanted.values())
    temporary = files.begin(imported.step, bytes_needed=needed)
    with disk_errors(temporary, needed=needed):
        written = [
            _write_parameter(temporary, name, imported.weights.read(name)) for name in wanted
        ]
    back = UniversalWeights(temporary, model)
    for name, parameter in wanted.items():
        assert tuple(back.read(name).shape) == true_shape(parameter)
    check(back)
    config = write_configuration(imported, folder, final)
    return files.commit(
        imported.step,
        files.seal_files(written),
        layout={
            "data_size": 1,
            "tensor_size": 1,
            "pipe_size": 1,
            "padded_vocab_size": model.padded_vocab_size(),
            "zero_stage": 1,
            "precision": imported.precision,
            UNIVERSAL: True,
        },
        config_hash=config.hash(),
        extra={
            "model": model.model_dump(mode="json", exclude=NOT_ARCHITECTURE),
            "torch": torch.__version__,
            IMPORTED: imported.origin,
        },
    )


def _write_parameter(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    path = folder / "zero" / name / "fp32.pt"
    path.parent.mkdir(parents=True)
    # A copy: a slice of a mapped file would take all of that file with it.
    torch.save({"param": tensor.to(torch.float32, copy=True).contiguous()}, path)
    return path


def write_configuration(imported: Imported, folder: Path, final: Path) -> Config:
    """Write ``model.yml`` (for a training run) and ``config.yml`` (what the tools look for)."""
    given = imported.model.model_dump(mode="json")
    # What is as it is by default would only hide what is not; sizes are always said.
    derived = {"num_kv_heads", "seq_length", "max_position_embeddings", "intermediate_size"}
    keys = {
        key: value
        for key, value in given.items()
        if key in derived or value != ModelConfig.model_fields[key].get_default()
    }
    paths = {
        key: value if key == "tokenizer_type" else str(final / "tokenizer" / value)
        for key, value in imported.tokenizer.items()
    }
    content = yaml.safe_dump({**keys, **paths}, sort_keys=False, allow_unicode=True)
    text = (
        f"# {imported.origin}\n# Start a run from it with this file and\n"
        f"#   load: {final}\n#   finetune: true\n{content}"
    )
    (folder / MODEL_NAME).write_text(text, encoding="utf-8")
    # A configuration is whole or none: evaluation and generation find the checkpoint by it, and
    # the rest is what no one who looks for a model reads.
    place = json.dumps(str(final))
    rest = [
        f"run_dir={place}", f"load={place}", "finetune=true", "train_iters=1",
        "train_micro_batch_size_per_gpu=1", "optimizer.params.lr=0.0001",
        "domains={none: {train: none}}", f"precision={imported.precision}",
    ]  # fmt: skip
    config = load_config([str(folder / MODEL_NAME)], overrides=rest)
    (folder / _CONFIG_NAME).write_text(config.resolved_yaml(), encoding="utf-8")
    return config
