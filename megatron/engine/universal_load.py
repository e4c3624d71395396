"""Loading a universal checkpoint into DeepSpeed's optimizers, whatever their layout.

DeepSpeed's own loading (0.19.8) is not used.  It takes hyperparameters, step counts and the
number of parameter groups from one rank of the run that saved; trips where a rank holds none of
a group; knows no division of fused parameters under ZeRO 3; and takes a padded vocabulary for a
whole one where a tensor rank's part is as large as the unpadded whole.  Here every rank reads
the parameters that it holds a part of, and cuts that part out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.engine.fragments import FlatPart, flat_parts, is_stage_3
from megatron.engine.universal import ADAM_STATE, OPTIMIZER_STATE
from megatron.errors import CheckpointError
from megatron.parallel.partition import Partition

_WEIGHTS = "fp32"
_STEP = "step"


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
            key: ``fp32``, or the name of a state tensor such as ``exp_avg``.
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

    def holds(self, names: Iterable[str]) -> bool:
        """Tell whether parameters are among those stored: all of them, or none.

        Raises:
            CheckpointError: some are and some are not.
        """
        known = {name: (self.folder / "zero" / name).is_dir() for name in names}
        missing = sorted(name for name, there in known.items() if not there)
        if missing and any(known.values()):
            raise CheckpointError(
                f"{self.folder} has no parameter {missing[0]}, and has others that are trained; "
                "the checkpoint is of another model"
            )
        return not missing

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


def load_universal(
    engine: Any,
    checkpoint: UniversalCheckpoint,
    *,
    weights_only: bool,
    state: Sequence[str] = ADAM_STATE,
) -> None:
    """Load weights, and unless ``weights_only`` the optimizer's state, into DeepSpeed's engine.

    Collective; every rank takes its own part.

    Args:
        engine: DeepSpeed's engine with ZeRO 1 to 3.
        checkpoint: what is loaded.
        weights_only: leave the optimizer as it was initialised.
        state: names of the optimizer's elementwise tensors; ``step`` among them where it counts.

    Raises:
        CheckpointError: the files do not fit the model, or the optimizer is on NVMe.
    """
    optimizer = engine.optimizer
    wanted = () if weights_only else state
    if is_stage_3(optimizer):
        _load_stage_3(optimizer, checkpoint, wanted)
    else:
        for part in flat_parts(optimizer):
            _fill(part, optimizer.optimizer.state, checkpoint, wanted)
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
    part: FlatPart, states: Any, checkpoint: UniversalCheckpoint, state: Sequence[str]
) -> None:
    """Fill one flat part of the fp32 weights and of the optimizer's state; padding becomes 0."""
    flat = part.flat
    for key in (_WEIGHTS, *state):
        if key == _STEP or (not part.fragments and key != _WEIGHTS):
            continue  # the optimizer makes a state of its own for padding alone
        filled = flat.data.zero_() if key == _WEIGHTS else torch.zeros_like(flat.data)
        for one in part.fragments:
            stored = checkpoint.part(one.name, key, one.shape).reshape(-1)
            filled.narrow(0, one.offset, one.size).copy_(stored.narrow(0, one.start, one.size))
        if key != _WEIGHTS:
            states[flat][key] = filled
    if _STEP in state and part.fragments:
        # A tensor of its own: the fused optimizer advances it in place.
        states[flat][_STEP] = torch.tensor(
            checkpoint.step(part.fragments[0].name), dtype=torch.float32, device=flat.device
        )


def _load_stage_3(optimizer: Any, checkpoint: UniversalCheckpoint, state: Sequence[str]) -> None:
    if optimizer.swap_optimizer or any(
        part is None for part in optimizer.fp16_partitioned_groups_flat
    ):
        raise CheckpointError(
            "a checkpoint of another layout cannot be loaded into an optimizer on NVMe; resume "
            "with the layout that wrote it, or offload to cpu"
        )
    optimizer.checkpoint_event_prologue()
    groups = zip(
        flat_parts(optimizer),
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for part, model_flat, model_parts in groups:
        _fill(part, optimizer.optimizer.state, checkpoint, state)
        model_flat.data.copy_(part.flat.data)
        updated = optimizer.unflatten(model_flat, model_parts)
        for held, value in zip(model_parts, updated, strict=True):
            held.data = value.data
    optimizer.checkpoint_event_epilogue()
