"""What stands where DeepSpeed's engine expects its checkpoint engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.engine.host_copy import compact

StateWriter = Callable[[Any, Path], None]
"""Takes what a file of a checkpoint holds, and the file."""


def write_plainly(state: Any, path: Path) -> None:
    """Write a file as ``torch.save`` does."""
    torch.save(compact(state), path)


def as_it_is(state: Any, path: str) -> Any:
    """Return ``state``."""
    return state


class CheckpointWriter:
    """Hands what DeepSpeed would write to whoever asked for the save, and notes the files.

    Each rank hashes and syncs exactly those, on whatever node it runs.

    Attributes:
        optimizer: whether the optimizer's state is written.
        written: files of this rank since the list was emptied.
        complete: adds to a state, given that and the file's path.
        write: writes it, or takes a copy.
    """

    def __init__(self, inner: Any) -> None:
        """Take the place of DeepSpeed's own, which still answers whatever else it is asked."""
        self._inner = inner
        self.optimizer = True
        self.written: list[Path] = []
        self.complete: Callable[[Any, str], Any] = as_it_is
        self.write: StateWriter = write_plainly

    def save(self, state_dict: Any, path: str) -> None:
        """Take what a file shall hold (DeepSpeed names the arguments)."""
        if not self.optimizer:
            if path.endswith("optim_states.pt"):
                return
            if "optimizer" in state_dict:  # without ZeRO it stands beside the weights
                state_dict = {**state_dict, "optimizer": None}
        self.write(self.complete(state_dict, path), Path(path))
        self.written.append(Path(path))

    def preserves_storage_sharing(self) -> bool:
        """Say that DeepSpeed need not clone what is a view of a larger buffer: we do."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
