"""Vetting of pickled files before DeepSpeed unpickles them.

DeepSpeed reads its checkpoints with ``torch.load(weights_only=False)``: a pickle that
names ``os.system`` runs it.  A pickle can only call what it names, so the names are
read first, without running anything, and compared with what the checkpoints of
DeepSpeed's engine hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron.checkpoint.files import walk_files
from megatron.errors import CheckpointError

DEEPSPEED_GLOBALS = frozenset(
    {
        # Optimizer shards of ZeRO 1-3: loss scaling (static and dynamic), the stage, and,
        # in stages 1 and 2, where each parameter lies in the flat buffer.  Model and layer
        # files and ZeRO 0 name nothing beyond torch's own tensors.
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""What DeepSpeed's checkpoints name beyond what torch itself holds to be safe."""

UNIVERSAL_GLOBALS = DEEPSPEED_GLOBALS | {
    # The blocks that a fused parameter is a concatenation of.
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
}
"""The same for checkpoints in DeepSpeed's universal format."""

_NOT_PICKLED = frozenset({".json", ".jsonl", ".npz", ".npy", ".safetensors", ".yml", ".txt"})


def vet_checkpoint(
    path: str | Path, *, allowed: Iterable[str] = DEEPSPEED_GLOBALS, skip: Iterable[str] = ()
) -> None:
    """Check every file of a checkpoint's folder that may hold a pickle.

    Args:
        path: the folder.
        allowed: names (``module.name``) that may occur beside torch's own.
        skip: relative paths to leave out (those that this process will not load).

    Raises:
        CheckpointError: see :func:`vet_file`.
    """
    skipped = set(skip)
    for name, _ in walk_files(Path(path)):
        if Path(name).suffix not in _NOT_PICKLED and name not in skipped:
            vet_file(Path(path) / name, allowed=allowed)


def vet_file(path: str | Path, *, allowed: Iterable[str] = DEEPSPEED_GLOBALS) -> None:
    """Check that ``path`` was written by ``torch.save`` and names nothing but known types.

    Nothing in the file is executed, and no tensor is read.

    Args:
        path: the file.
        allowed: names (``module.name``) that may occur beside torch's own.

    Raises:
        CheckpointError: the file names something else (each name is given), or is not
            in torch's zip format, or is a TorchScript program, or cannot be read.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        named = set(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as error:  # whatever a hostile or damaged file does to the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be vetted and is not loaded: it is damaged, or was not written by "
            f"this software ({reason})"
        ) from error
    strange = sorted(named - set(allowed))
    if strange:
        raise CheckpointError(
            f"{path} is not loaded: unpickling it would run {', '.join(strange)}, which no "
            "checkpoint of this software holds; use a checkpoint from a source you trust"
        )
