"""DeepSpeed's files of a GPT-NeoX checkpoint, as weights of a model of ours.

Without a pipeline a tensor rank's file ``mp_rank_XX_model_states.pt`` holds everything under
``module``, as ``sequential.{layer}.…``; with one every layer has its files,
``layer_LL-model_MM-model_states.pt``.  Layers count from 0, the embedding; blocks begin at 2,
because 1 does nothing, and so does the one after the last block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron.checkpoint.vet import DEEPSPEED_GLOBALS, vet_file
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.exchange.weights import join, load_file, parameters, partition_of, true_shape

_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
NEOX_GLOBALS = DEEPSPEED_GLOBALS | {
    # States of random number generators, which are arrays of numpy.
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    "builtins.set",
    "__builtin__.set",
}
# Buffers that are computed anew, and what transformer-engine keeps for itself.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\._extra_state|masked_bias)$")
_ROW_BIASES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
_SYNONYMS = {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}

RowBiases = Literal["auto", "sum", "copies"]
GroupedLayout = Literal["auto", "blocks", "heads"]


@dataclass(frozen=True, kw_only=True)
class NeoxOptions:
    """How the parts of tensor ranks are read, where the files do not say it.

    Attributes:
        row_biases: biases of ``attention.dense`` and ``mlp.dense_4h_to_h``: ``sum`` where every
            rank adds a part of its own before the sum over ranks (GPT-NeoX with
            ``gpt_j_residual``), ``copies`` where every rank adds the same after it; ``auto``
            goes by ``gpt_j_residual``.
        grouped: ``query_key_value`` of heads that share keys and values: ``blocks`` is
            ``[queries | keys | values]`` (GPT-NeoX today), ``heads`` a head's query and its
            share of keys and values after the other (before); ``auto`` goes by the names of the
            MLP, which changed in the same time.
    """

    row_biases: RowBiases = "auto"
    grouped: GroupedLayout = "auto"


def is_deepspeed(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint in DeepSpeed's files, or holds some."""
    return checkpoint_folder(folder, None) is not None and not (folder / "manifest.json").exists()


def checkpoint_folder(given: Path, step: int | None) -> Path | None:
    """Return the folder with DeepSpeed's files that a command line names; None without one.

    Args:
        given: that folder, or one with ``latest`` in it.
        step: which of several.
    """
    if not given.is_dir():
        return None
    if any(_files(given)):
        return given
    name = f"global_step{step}"
    if step is None:
        latest = given / "latest"
        name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    inside = given / name
    return inside if name and Path(name).name == name and any(_files(inside)) else None


def _files(folder: Path) -> list[re.Match[str]]:
    if not folder.is_dir() or (folder / "manifest.json").exists():
        return []
    found = (
        pattern.fullmatch(path.name)
        for path in sorted(folder.iterdir())
        for pattern in (_MODEL_FILE, _LAYER_FILE)
    )
    return [match for match in found if match is not None]


def stored_parts(folder: Path, layer: int, names: Sequence[str]) -> list[torch.Tensor]:
    """Return every tensor rank's part of a parameter, before anything is known of the model.

    Args:
        folder: the checkpoint's.
        layer: number of its layer.
        names: what it may be called there.

    Raises:
        CheckpointError: it is not there, or the files hold more than a checkpoint's types.
    """
    found = []
    for match in _files(folder):
        layered = match.re is _LAYER_FILE
        if layered and int(match.group(1)) != layer:
            continue
        path = folder / match.string
        vet_file(path, allowed=NEOX_GLOBALS)
        content = load_file(path, vetted=True)
        module = content if layered else content.get("module") or {}
        prefix = "" if layered else f"sequential.{layer}."
        found += [module[prefix + name] for name in names if prefix + name in module]
    if not found:
        raise CheckpointError(f"{folder} holds no {names[0]} in layer {layer}")
    return found


class NeoxWeights:
    """Parameters of a GPT-NeoX checkpoint under our names, whole."""

    def __init__(self, folder: Path, model: ModelConfig, options: NeoxOptions) -> None:
        """Vet the files and find out how many tensor ranks wrote them.

        Raises:
            CheckpointError: they hold more than a checkpoint's types, or are of another model.
        """
        self._folder, self._model, self._options = folder, model, options
        self._parameters = parameters(model)
        matches = _files(folder)
        layered = [match for match in matches if match.re is _LAYER_FILE]
        whole = [match for match in matches if match.re is _MODEL_FILE]
        self._pipeline = bool(layered)
        self.ranks = len({m.group(2) for m in layered} if layered else {m.group(1) for m in whole})
        for match in layered or whole:
            vet_file(folder / match.string, allowed=NEOX_GLOBALS)
        self._open: dict[str, Mapping[str, Any]] = {}
        self._layers: dict[int, list[Mapping[str, Any]]] = {}
        self._check_names({int(match.group(1)) for match in layered})

    def read(self, name: str) -> torch.Tensor:
        """See :class:`~megatron.exchange.weights.Weights`."""
        layer, own = self._place(name)
        parts = self._parts(layer, own)
        parameter = self._parameters[name]
        partition = partition_of(parameter)
        if partition is None:
            return self._copies(own, parts)
        shape = true_shape(parameter)
        if own == "final_linear.weight" and parts[0].shape[1] < shape[1]:
            # output_layer_parallelism: row
            return torch.cat(parts, dim=1)[: shape[0]]
        if "query_key_value" in own and len(partition.blocks) > 1 and self._by_head(layer):
            parts = [self._to_blocks(part) for part in parts]
        whole = join(parts, partition, name)
        if tuple(whole.shape) != shape:
            raise CheckpointError(
                f"{self._folder}: parameter {own} of layer {layer} is {tuple(whole.shape)}, "
                f"and the configuration says {shape}"
            )
        return whole

    def _parts(self, layer: int, own: str) -> list[torch.Tensor]:
        """Return every tensor rank's part of a parameter, by its name in our layers."""
        stored = self._layer(layer)
        spelt = self._spelling(stored[0], own)
        if isinstance(spelt, str):
            return [one[spelt] for one in stored]
        return [torch.cat([one[name] for name in spelt]) for one in stored]

    def _spelling(self, stored: Mapping[str, Any], own: str) -> str | tuple[str, ...]:
        """Return what files call a parameter; a gated MLP was once three layers by themselves."""
        if own in stored:
            return own
        for ours, other in _SYNONYMS.items():
            if (renamed := own.replace(f"mlp.{ours}.", f"mlp.{other}.")) in stored:
                return renamed
        kind = own.rpartition(".")[2]
        if own.startswith("mlp.dense_h_to_4h.") and f"mlp.w1.{kind}" in stored:
            return f"mlp.w3.{kind}", f"mlp.w1.{kind}"
        if own.startswith("mlp.dense_4h_to_h.") and f"mlp.w2.{kind}" in stored:
            return f"mlp.w2.{kind}"
        raise CheckpointError(
            f"{self._folder} has no parameter {own}; the configuration is of another model"
        )

    def _copies(self, own: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return one parameter of those that every rank has whole."""
        if len(parts) == 1:
            return parts[0]
        total = torch.stack([part.float() for part in parts]).sum(dim=0)
        way = self._options.row_biases
        if way == "auto":
            way = "sum" if self._model.gpt_j_residual else "copies"
        if own in _ROW_BIASES and way == "sum":
            return total
        if all(torch.equal(part, parts[0]) for part in parts):
            return parts[0]
        return total / len(parts)

    def _by_head(self, layer: int) -> bool:
        way = self._options.grouped
        return way == "heads" or (way == "auto" and "mlp.w1.weight" in self._layer(layer)[0])

    def _to_blocks(self, part: torch.Tensor) -> torch.Tensor:
        """Put a part that goes head by head into blocks of queries, keys and values."""
        model = self._model
        heads, size = model.num_attention_heads // self.ranks, model.head_size
        share = size * (model.num_kv_heads or heads) // model.num_attention_heads
        by_head = part.view(heads, size + 2 * share, *part.shape[1:])
        blocks = torch.split(by_head, [size, share, share], dim=1)
        return torch.cat([block.reshape(-1, *part.shape[1:]) for block in blocks])

    def _place(self, name: str) -> tuple[int, str]:
        """Return a parameter's layer there, and its name in that layer."""
        first, _, own = name.partition(".")
        if first == "tied_modules":
            return 0, own.partition(".")[2]
        index, blocks = int(first), self._model.num_layers
        if index == 0:
            return 0, own
        return index + (1 if index <= blocks else 2), own

    def _layer(self, layer: int) -> list[Mapping[str, Any]]:
        if layer not in self._layers:
            self._layers = {layer: [self._stored(layer, rank) for rank in range(self.ranks)]}
        return self._layers[layer]

    def _stored(self, layer: int, rank: int) -> Mapping[str, Any]:
        if self._pipeline:
            name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            return load_file(self._folder / name, vetted=True)
        name, prefix = f"mp_rank_{rank:02d}_model_states.pt", f"sequential.{layer}."
        return {
            key.removeprefix(prefix): value
            for key, value in self._module(name).items()
            if key.startswith(prefix)
        }

    def _module(self, name: str) -> Mapping[str, Any]:
        if name not in self._open:
            content = load_file(self._folder / name, vetted=True).get("module")
            if not isinstance(content, Mapping):
                raise CheckpointError(
                    f"{self._folder / name} holds no model under 'module'; the files "
                    "layer_…-model_… of a pipeline's checkpoint are missing"
                )
            self._open[name] = content
        return self._open[name]

    def _check_names(self, layers: set[int]) -> None:
        """Refuse what no parameter of the model takes: it would change what is computed."""
        taken: dict[int, set[str]] = {}
        for name in self._parameters:
            layer, own = self._place(name)
            spelt = self._spelling(self._layer(layer)[0], own)
            taken.setdefault(layer, set()).update((spelt,) if isinstance(spelt, str) else spelt)
        if not self._pipeline:
            module = self._module("mp_rank_00_model_states.pt")
            layers = {int(key.split(".")[1]) for key in module if key.startswith("sequential.")}
        last = self._model.num_layers + 4
        if not self._model.no_weight_tying and last in layers:
            # The tied output may be kept once more; another one is not tied.
            stored, again = self._layer(0)[0]["word_embeddings.weight"], self._layer(last)[0]
            same = {name for name, value in again.items() if torch.equal(value, stored)}
            taken.setdefault(last, set()).update(same)
        left = [
            f"{layer}.{own}"
            for layer in sorted(layers)
            for own in self._layer(layer)[0]
            if own not in taken.get(layer, ()) and not _BUFFERS.search(own)
        ]
        if left:
            raise CheckpointError(
                f"{self._folder} holds parameters that the model of the configuration has not: "
                f"{', '.join(left[:8])}{' …' if len(left) > 8 else ''}; give the configuration "
                "that it was trained with (--config_file)"
            )
