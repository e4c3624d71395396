"""Whole parameters, one at a time, out of a checkpoint of ours in whatever layout wrote it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from megatron.checkpoint.files import disk_errors
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.vet import UNIVERSAL_GLOBALS, vet_checkpoint
from megatron.config import ModelConfig
from megatron.engine.universal import convert_to_universal
from megatron.engine.universal_load import UniversalCheckpoint
from megatron.errors import CheckpointError
from megatron.model.gpt import GPT
from megatron.parallel.partition import Partition
from megatron.training.compatible import saved_state
from megatron.training.conversion import is_universal


class Weights(Protocol):
    """A model's parameters by global name, whole and without padding."""

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter on the CPU.

        Raises:
            CheckpointError: it is not there, or of another shape.
        """
        ...


def parameters(model: ModelConfig) -> dict[str, nn.Parameter]:
    """Return every parameter of a model by global name, on "meta", each with its ``partition``."""
    return dict(GPT(model, seed=0, device="meta").named_parameters())


def partition_of(parameter: nn.Parameter) -> Partition | None:
    """Return how tensor ranks divide a parameter; None if each holds all of it."""
    return getattr(parameter, "partition", None)


def true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's shape without padding."""
    partition = partition_of(parameter)
    return tuple((parameter if partition is None else partition.unpad(parameter)).shape)


def join(parts: list[torch.Tensor], partition: Partition | None, name: str) -> torch.Tensor:
    """Return a whole parameter from the tensor ranks' parts, without padding.

    Args:
        parts: in the order of the ranks.
        partition: how they divide it; None where each holds all of it.
        name: for messages.

    Raises:
        CheckpointError: the parts do not make up the parameter.
    """
    try:
        if partition is None:
            return parts[0]
        if partition.padded_from is not None:
            # Another number of ranks pads to another size.
            return partition.unpad(torch.cat(parts, dim=partition.dim))
        return partition.join(parts)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise CheckpointError(
            f"parameter {name}: parts of shape {shapes} do not make it up ({error}); the "
            "checkpoint is of another model than its configuration says"
        ) from error


class UniversalWeights:
    """Weights in DeepSpeed's universal format: float32, as the optimizer keeps them."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Name the folder (vetted) and the model."""
        self._parameters = parameters(model)
        self._checkpoint = UniversalCheckpoint(
            folder,
            partitions={name: partition_of(one) for name, one in self._parameters.items()},
            tensor_rank=0,
            tensor_size=1,
        )

    def read(self, name: str) -> torch.Tensor:
        """See :class:`Weights`."""
        parameter = self._parameters[name]
        part = self._checkpoint.part(name, "fp32", parameter.shape)
        partition = partition_of(parameter)
        return part if partition is None else partition.unpad(part)


class LayoutWeights:
    """Weights in the files of the layout that trained, in its number format.

    Without a pipeline a tensor rank has one file; with one, every layer has a file for each
    tensor rank.
    """

    def __init__(self, folder: Path, manifest: Manifest, model: ModelConfig) -> None:
        """Name the folder (vetted) and the model."""
        self._folder = folder
        self._parameters = parameters(model)
        self._ranks = int(manifest.layout.get("tensor_size", 1))
        self._pipeline = int(manifest.layout.get("pipe_size", 1)) > 1
        self._open: dict[str, Mapping[str, Any]] = {}

    def read(self, name: str) -> torch.Tensor:
        """See :class:`Weights`."""
        parts = [self._part(name, rank) for rank in range(self._ranks)]
        return join(parts, partition_of(self._parameters[name]), name)

    def _part(self, name: str, rank: int) -> torch.Tensor:
        if not self._pipeline:
            file, key = f"mp_rank_{rank:02d}_model_states.pt", name
        else:
            first, _, rest = name.partition(".")
            # The tied embedding is the first layer, and kept there once.
            layer, key = (0, rest.partition(".")[2]) if first == "tied_modules" else (first, rest)
            file = f"layer_{int(layer):02d}-model_{rank:02d}-model_states.pt"
        held = self._file(file)
        if key not in held:
            raise CheckpointError(
                f"{self._folder / file} has no parameter {key}; the checkpoint is of another model "
                "than its configuration says"
            )
        tensor: torch.Tensor = held[key]
        return tensor

    def _file(self, name: str) -> Mapping[str, Any]:
        if name not in self._open:
            if self._pipeline:
                # One layer at a time: what was mapped for the one before is let go.
                layer = name.partition("-")[0]
                self._open = {k: v for k, v in self._open.items() if k.startswith(f"{layer}-")}
            content = load_file(self._folder / name)
            self._open[name] = content if self._pipeline else content["module"]
        return self._open[name]


def load_file(path: Path, *, vetted: bool = False) -> dict[str, Any]:
    """Map a file of ``torch.save`` into memory.

    Args:
        path: the file.
        vetted: whether what it names was looked at; it may then hold more than tensors.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=not vetted)
    except Exception as error:  # whatever a damaged file does to the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read {path}: {reason}; use another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where parameters belong")
    return content


@contextlib.contextmanager
def open_weights(
    path: Path,
    manifest: Manifest,
    model: ModelConfig,
    *,
    exact: bool,
    scratch: Path,
    say: Callable[[str], None],
) -> Iterator[Weights]:
    """Open a verified checkpoint's weights, whatever its layout.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest.
        model: what it holds.
        exact: give the optimizer's float32 weights, not the rounded ones that a run in half
            precision computes with.
        scratch: folder for a temporary conversion, where the files cannot be read as they are.
        say: takes a line for the console.

    Raises:
        CheckpointError: a file holds more than tensors and plain values, or cannot be converted.
        RunError: there is no room for the conversion.
    """
    if is_universal(manifest):
        vet_checkpoint(path, allowed=UNIVERSAL_GLOBALS)
        yield UniversalWeights(path, model)
        return
    vet_checkpoint(path)
    stage, precision = manifest.layout.get("zero_stage"), manifest.layout.get("precision")
    convertible = stage != 0 and manifest.step > 0
    if stage != 3 and (precision == "fp32" or not (exact and convertible)):
        yield LayoutWeights(path, manifest, model)
        return
    if not convertible:
        raise CheckpointError(
            f"{path} is of step 0 under ZeRO 3, whose weights lie in pieces that only an optimizer "
            "step makes whole again; take a later checkpoint, or save step 0 under ZeRO 1"
        )
    say(f"putting the parameters of {path} together (all of its state, for a while, on disk)")
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".universal-", dir=scratch) as place:
        with disk_errors(scratch, needed=2 * manifest.total_bytes):
            state = saved_state(manifest.layout, path, weights_only=True)
            convert_to_universal(path, Path(place), state=state)
        yield UniversalWeights(Path(place), model)
