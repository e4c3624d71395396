"""A folder that transformers loads: what tells it from another, and its model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron.errors import CheckpointError, DataError
from megatron.selection.language_model import CONFIG_FILE
from megatron.selection.libraries import load

_WEIGHTS = (".safetensors", ".bin")
_PLACES, _PIECE = 64, 4096


def folder_identity(folder: Path) -> str:
    """Return a hash of a model: of its configuration, and of its weights at many places.

    Weights are read at 64 places of each file, its ends among them, and its size counts: training
    changes nearly every number, and reading all of a large model would take minutes in every
    shard.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        # A note of the version that wrote it says nothing of the model.
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        files = [one for one in sorted(folder.iterdir()) if one.suffix in _WEIGHTS]
        for file in files:
            size = file.stat().st_size
            digest.update(f"\x1f{file.name}\x1f{size}\x1f".encode())
            with open(file, "rb") as content:
                for place in range(_PLACES):
                    content.seek(max(0, size - _PIECE) * place // (_PLACES - 1))
                    digest.update(content.read(_PIECE))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"--model {folder}: cannot be read: {error}") from None
    if not files:
        raise CheckpointError(
            f"--model {folder}: there is a {CONFIG_FILE}, and no weights ({', '.join(_WEIGHTS)})"
        )
    return digest.hexdigest()


def tokenizer_identity(folder: Path) -> str | None:
    """Return the SHA-256 (hex) of ``tokenizer.json``, as sidecars of data have it; None without."""
    file = folder / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def load_tokenizer(folder: Path, purpose: str) -> Any:
    """Return the folder's tokenizer.

    Raises:
        DataError: there is none.
        MissingExtraError: transformers is not installed.
    """
    library = load("transformers", purpose)
    library.logging.set_verbosity_error()
    try:
        return library.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the library raises over a folder
        raise DataError(
            f"--model {folder}: no tokenizer that transformers can load "
            f"({str(error).splitlines()[0]}); save the model's tokenizer into the folder"
        ) from error


def load_causal(folder: Path, purpose: str, dtype: torch.dtype, **settings: Any) -> Any:
    """Return the folder's causal language model, in inference mode, on the CPU.

    Raises:
        CheckpointError: transformers does not load it, or finds weights missing.
        MissingExtraError: transformers is not installed.
    """
    library = load("transformers", purpose)
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        model, loaded = library.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **settings,
        )
    except Exception as error:  # whatever the library raises over a folder
        raise CheckpointError(
            f"--model {folder}: transformers does not load it: {error}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise CheckpointError(
            f"--model {folder}: weights are missing and would be random: {', '.join(missing[:5])}; "
            "give a folder of a trained causal language model"
        )
    return model.eval()


def longest_input(config: Any) -> int | None:
    """Return the positions that a model has, as its configuration says; None for any number."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def forward_matrices(model: Any) -> float:
    """Return the numbers of a model that each multiply a number of every token.

    Weights with two dimensions outside of the embeddings, and the output's, which may be the
    input's; of experts the share that a token goes to.
    """
    inputs = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    embedded = {id(module.weight) for module in model.modules() if _is_embedding(module)}
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen else 1.0
    total = float(inputs.numel() if output is None else output.weight.numel())
    for name, parameter in model.named_parameters():
        head = output is not None and parameter is output.weight
        if parameter.dim() < 2 or id(parameter) in embedded or head:
            continue
        total += parameter.numel() * (share if ".experts." in name else 1.0)
    return total


def _is_embedding(module: Any) -> bool:
    return isinstance(module, torch.nn.Embedding)


def attention_width(config: Any) -> float:
    """Return the width of queries summed over layers: layers × heads × width of a head."""
    layers = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "n_layer", 0) or 0)
    hidden = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0) or 0)
    heads = getattr(config, "num_attention_heads", None)
    head = getattr(config, "head_dim", None)
    return float(layers * (heads * head if heads and head else hidden))


def causal_flops(matrices: float, width: float, length: int) -> float:
    """Return the operations of one forward pass over a sequence.

    ``2·N·s + 4·w·s·s/2``: the formula that training is counted by
    (:func:`megatron.model.accounting.flops_per_token`), a third of it.
    """
    return length * (2.0 * matrices + 2.0 * width * length)
