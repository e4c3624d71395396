"""One optimizer step at a time over DeepSpeed's engine.

The rest of neomix sees :class:`TrainEngine` only: a step, an evaluation pass, a save and a
load.  Pipeline parallelism will be a second class with the same four methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        skipped: the update was dropped because a gradient was not finite.
        grad_norm: global gradient norm before clipping, still on the device where
            DeepSpeed left it, or None if it computed none.
    """

    skipped: bool
    grad_norm: float | torch.Tensor | None


class TrainEngine:
    """DeepSpeed's engine behind the calls that the training loop needs.

    Args:
        model: the module; called with ``(tokens, labels)`` it returns the scaled loss.
        optimizer: see :func:`megatron.engine.optimizer.build_optimizer`.
        config: DeepSpeed's configuration.
        before_micro_batch: called with the micro-batch's number before its forward pass
            (dropout generators are re-seeded there).
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        before_micro_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Hand the model to DeepSpeed, which moves, casts and partitions it."""
        import deepspeed

        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config), dist_init_required=False
        )
        self._before_micro_batch = before_micro_batch or (lambda step, micro: None)
        self._writer = _RecordingWriter(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = self._writer

    @property
    def module(self) -> nn.Module:
        """The model as DeepSpeed holds it."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def loss_scale(self) -> float:
        """The current loss scale (1 in fp32 and bf16)."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def train_step(
        self, step: int, micro_batches: Iterable[tuple[torch.Tensor, Any]], *, lr: float
    ) -> StepOutcome:
        """Run forward and backward on every micro-batch, then the optimizer.

        Args:
            step: number of the optimizer step, from 1.
            micro_batches: ``accumulation`` pairs of tokens [B, S] and labels, on the device.
            lr: learning rate of this step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self._engine.skipped_steps
        count = 0
        for micro, (tokens, labels) in enumerate(micro_batches):
            self._before_micro_batch(step, micro)
            loss = self._engine(tokens, labels)
            self._engine.backward(loss)
            self._engine.step()
            count += 1
        assert count == self.accumulation, f"{count} micro-batches, expected {self.accumulation}"
        return StepOutcome(
            skipped=self._engine.skipped_steps > skipped_before,
            grad_norm=self._engine.get_global_grad_norm(),
        )

    @contextmanager
    def evaluating(self) -> Any:
        """Switch to evaluation mode and to no gradients for the time of a ``with`` block."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def forward(self, tokens: torch.Tensor, labels: Any) -> torch.Tensor:
        """Run the model on one micro-batch, inside :meth:`evaluating`."""
        return self._engine(tokens, labels)  # type: ignore[no-any-return]

    def save(self, directory: Path, tag: str, client_state: Mapping[str, Any]) -> list[Path]:
        """Write this rank's part of a checkpoint into ``directory / tag``.

        Returns:
            The files that this rank wrote.
        """
        self._writer.written.clear()
        self._engine.save_checkpoint(
            str(directory), tag=tag, client_state=dict(client_state), save_latest=False
        )
        return list(self._writer.written)

    def load(self, directory: Path, tag: str, *, weights_only: bool = False) -> None:
        """Load a checkpoint that :meth:`save` (or the conversion) wrote.

        Args:
            directory: folder of the checkpoint's folder.
            tag: name of the checkpoint's folder.
            weights_only: leave the optimizer as it was initialised.

        Raises:
            CheckpointError: DeepSpeed found nothing it could load.
        """
        hyperparameters = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        path, _ = self._engine.load_checkpoint(
            str(directory),
            tag=tag,
            load_optimizer_states=not weights_only,
            load_lr_scheduler_states=False,
            load_module_only=weights_only,
        )
        if path is None:
            raise CheckpointError(f"DeepSpeed could not load the checkpoint {directory / tag}")
        self._separate_groups(hyperparameters)

    def _separate_groups(self, hyperparameters: list[dict[str, Any]]) -> None:
        """Undo two slips of DeepSpeed's universal load under ZeRO-3 (0.19.8).

        It gives every parameter group the first group's hyperparameters (biases would
        decay), and every parameter the same step tensor, which the fused optimizer then
        advances once for each of them.
        """
        for group, own in zip(self._optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)
        for state in self._optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


class _RecordingWriter:
    """DeepSpeed's checkpoint writer, noting which files this rank wrote.

    Each rank hashes and syncs exactly those, on whatever node it runs.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.written: list[Path] = []

    def save(self, state_dict: Any, path: str) -> Any:
        result = self._inner.save(state_dict, path)
        self.written.append(Path(path))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
