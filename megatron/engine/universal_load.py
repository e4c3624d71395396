"""Loading a universal checkpoint into DeepSpeed's optimizers, whatever their layout.

DeepSpeed's own loading (0.19.8) is not used.  It takes hyperparameters, step counts and the
number of parameter groups from one rank of the run that saved; trips where a rank holds none of
a group; knows no division of fused parameters under ZeRO 3; and takes a padded vocabulary for a
whole one where a tensor rank's part is as large as the unpadded whole.  Here every rank reads
the parameters that it holds a part of, and cuts that part out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.engine.universal import OPTIMIZER_STATE
from megatron.errors import CheckpointError
from megatron.parallel.partition import Partition

_WEIGHTS = "fp32"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class _Fragment:
    """A piece of one parameter in a flat part of the optimizer's state.

    Attributes:
        name: the parameter's name.
        shape: this tensor rank's shape of it.
        start: where the piece begins in the parameter, flattened.
        size: numbers in it.
        offset: where it begins in the flat part.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int


class UniversalCheckpoint:
    """The files of a universal checkpoint, as one tensor rank sees them."""

    def __init__(
        self,
        folder: Path,
        *,
        partitions: Mapping[str, Partition | None],
        tensor_rank: int,
        tensor_size: int,
    ) -> None:
        """Name the folder.

        Args:
            folder: of the checkpoint.
            partitions: how tensor ranks divide each parameter, by name.
            tensor_rank: this rank's number among those that share its layers.
            tensor_size: how many those are.
        """
        self.folder = folder
        self._partitions = partitions
        self._rank, self._ranks = tensor_rank, tensor_size

    def part(self, name: str, key: str, shape: Sequence[int]) -> torch.Tensor:
        """Return this rank's part of a parameter's weights or of one of its moments.

        Args:
            name: global name of the parameter.
            key: ``fp32``, ``exp_avg`` or ``exp_avg_sq``.
            shape: of the part.

        Raises:
            CheckpointError: the file is missing, or of a parameter of another shape.
        """
        stored = self._read(f"zero/{name}/{key}.pt")
        full: torch.Tensor = stored["param"] if isinstance(stored, dict) else stored
        try:
            part = _divide(full, self._partitions[name], shape, self._rank, self._ranks)
        except (RuntimeError, ValueError):
            part = None
        if part is None or part.shape != tuple(shape):
            raise CheckpointError(
                f"{self.folder}: parameter {name} is stored as {tuple(full.shape)}, which does "
                f"not divide into this run's {tuple(shape)} on {self._ranks} tensor ranks; the "
                "checkpoint is of another model"
            )
        return part

    def step(self, name: str) -> float:
        """Return how many updates a parameter has had."""
        if (self.folder / "zero" / name / "step.pt").exists():
            return float(self._read(f"zero/{name}/step.pt"))
        return float(self.common["optimizer_state_dict"]["state"][0]["step"])

    @property
    def common(self) -> dict[str, Any]:
        """What is not of any one parameter, the loss scale among it."""
        return dict(self._read(OPTIMIZER_STATE, anything=True))

    @property
    def counters(self) -> dict[str, Any]:
        """DeepSpeed's counts of steps and samples."""
        files = sorted(self.folder.glob("*_model_states.pt"))
        if not files:
            raise CheckpointError(f"{self.folder} holds no *_model_states.pt; convert it again")
        return dict(self._read(files[0].name, anything=True))

    def _read(self, name: str, *, anything: bool = False) -> Any:
        """Read a file; ``anything`` is for those that hold DeepSpeed's own (vetted) types."""
        from deepspeed.checkpoint.universal_checkpoint import SubparamShape

        path = self.folder / name
        try:
            with torch.serialization.safe_globals([SubparamShape]):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=not anything)
        except Exception as error:  # whatever a damaged or hostile file does to the reader
            raise CheckpointError(
                f"cannot read {path} of the universal checkpoint: {error}; convert it again"
            ) from error


def load_universal(engine: Any, checkpoint: UniversalCheckpoint, *, weights_only: bool) -> None:
    """Load weights, and unless ``weights_only`` the optimizer's state, into DeepSpeed's engine.

    Collective; every rank takes its own part.

    Args:
        engine: DeepSpeed's engine with ZeRO 1 to 3.
        checkpoint: what is loaded.
        weights_only: leave the optimizer as it was initialised.

    Raises:
        CheckpointError: the files do not fit the model, or the optimizer is on NVMe.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        _load_stage_3(optimizer, checkpoint, weights_only=weights_only)
    else:
        for flat, fragments in _fragments(optimizer):
            _fill(flat, optimizer.optimizer.state, fragments, checkpoint, weights_only=weights_only)
        optimizer.update_lp_params()
    if weights_only:
        return
    common, counters = checkpoint.common, checkpoint.counters
    # Another precision scales in its own way.
    if type(common.get("loss_scaler")) is type(getattr(optimizer, "loss_scaler", None)):
        optimizer.loss_scaler = common["loss_scaler"]
    for key in ("global_steps", "global_samples", "skipped_steps"):
        if key in counters:
            setattr(engine, key, counters[key])


def _divide(
    full: torch.Tensor, partition: Partition | None, shape: Sequence[int], rank: int, ranks: int
) -> torch.Tensor:
    """Cut a tensor rank's part out of a stored parameter."""
    if partition is None:
        return full.reshape(tuple(shape))
    # The conversion under ZeRO 3 leaves parameters flat, and the vocabulary padded.
    whole = [-1 if dim == partition.dim else size for dim, size in enumerate(shape)]
    full = full.reshape(whole)
    return partition.part(partition.pad(partition.unpad(full)), rank, ranks)


def _fill(
    flat: torch.Tensor,
    states: Any,
    fragments: Sequence[_Fragment],
    checkpoint: UniversalCheckpoint,
    *,
    weights_only: bool,
) -> None:
    """Fill one flat part of the fp32 weights and of the moments; padding becomes 0."""
    keys = (_WEIGHTS,) if weights_only else (_WEIGHTS, *_MOMENTS)
    for key in keys:
        if not fragments and key != _WEIGHTS:
            continue  # the optimizer makes a state of its own for padding alone
        filled = flat.data.zero_() if key == _WEIGHTS else torch.zeros_like(flat.data)
        for one in fragments:
            part = checkpoint.part(one.name, key, one.shape).reshape(-1)
            filled.narrow(0, one.offset, one.size).copy_(part.narrow(0, one.start, one.size))
        if key != _WEIGHTS:
            states[flat][key] = filled
    if not weights_only and fragments:
        # A tensor of its own: the fused optimizer advances it in place.
        states[flat]["step"] = torch.tensor(
            checkpoint.step(fragments[0].name), dtype=torch.float32, device=flat.device
        )


def _fragments(optimizer: Any) -> Iterator[tuple[torch.Tensor, list[_Fragment]]]:
    """Yield this rank's flat part of every parameter group, and what lies in it (ZeRO 1, 2)."""
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for group, parameters in zip(optimizer.optimizer.param_groups, groups, strict=True):
        found = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            own, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            found.append(
                _Fragment(
                    name=optimizer.param_names[parameter],
                    shape=tuple(parameter.shape),
                    start=own.start,
                    size=own.numel,
                    offset=flat.start,
                )
            )
        yield group["params"][0], found


def _load_stage_3(optimizer: Any, checkpoint: UniversalCheckpoint, *, weights_only: bool) -> None:
    if optimizer.swap_optimizer or any(
        part is None for part in optimizer.fp16_partitioned_groups_flat
    ):
        raise CheckpointError(
            "a checkpoint of another layout cannot be loaded into an optimizer on NVMe; resume "
            "with the layout that wrote it, or offload to cpu"
        )
    optimizer.checkpoint_event_prologue()
    groups = zip(
        optimizer.fp16_groups,
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for parameters, flat, model_flat, model_parts in groups:
        fragments = list(_stage_3_fragments(optimizer, parameters))
        _fill(flat, optimizer.optimizer.state, fragments, checkpoint, weights_only=weights_only)
        model_flat.data.copy_(flat.data)
        updated = optimizer.unflatten(model_flat, model_parts)
        for held, value in zip(model_parts, updated, strict=True):
            held.data = value.data
    optimizer.checkpoint_event_epilogue()


def _stage_3_fragments(optimizer: Any, parameters: Sequence[Any]) -> Iterator[_Fragment]:
    """Yield what lies in a flat part: of every parameter an equal share, the last one padded."""
    offset = 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = share * torch.distributed.get_rank(
            group=optimizer._get_param_partition_group(parameter)
        )
        size = max(0, min(share, parameter.ds_numel - start))
        if size:
            yield _Fragment(
                name=optimizer.param_names[parameter],
                shape=tuple(parameter.ds_shape),
                start=start,
                size=size,
                offset=offset,
            )
        offset += share
