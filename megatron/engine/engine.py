"""One optimizer step at a time over DeepSpeed's engine.

The rest of neomix sees :class:`TrainEngine` only: a step, an evaluation pass, a save and a
load.  There are two of it: :mod:`megatron.engine.sequential`, where every rank runs all layers
(or its tensor rank's part of them), and :mod:`megatron.engine.pipeline`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.engine.checkpoint_writer import CheckpointWriter, StateWriter, as_it_is, write_plainly
from megatron.engine.clock import StepClock
from megatron.engine.device_skip import DeviceSkip, applies
from megatron.engine.experts import SharedExperts
from megatron.engine.gradient_norm import take_norms
from megatron.engine.lone_rank import spare_reduction
from megatron.engine.observer import StepObserver, StepOutcome
from megatron.engine.optimizer import describe_flat_parts
from megatron.engine.sm3 import Groups
from megatron.engine.universal import ADAM_STATE, plain_path
from megatron.engine.universal_load import UniversalCheckpoint, load_universal
from megatron.errors import CheckpointError
from megatron.parallel.partition import Partition

LossFunction = Callable[[Any, Any], torch.Tensor]
"""Takes the last layer's output and the labels; returns a scalar."""


class TrainEngine(ABC):
    """DeepSpeed's engine behind the calls that the training loop needs.

    Args:
        engine: DeepSpeed's engine.
        optimizer: as DeepSpeed returned it.
        partitions: how tensor ranks divide each parameter, by name, as
            :func:`tensor_partitions` found it before DeepSpeed took the model.
        before_micro_batch: called with the step and the micro-batch's number before its
            forward pass (dropout generators are re-seeded there).
        experts: those that data ranks share out.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: Any,
        partitions: Mapping[str, Partition | None],
        before_micro_batch: Callable[[int, int], None] | None = None,
        experts: SharedExperts | None = None,
    ) -> None:
        """Take the engine over."""
        self._experts = experts
        self._engine = engine
        self._optimizer = optimizer
        self.partitions = dict(partitions)
        self._before_micro_batch = before_micro_batch or (lambda step, micro: None)
        self._observers: list[StepObserver] = []
        self._reading: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches
        self._betas: Callable[[int], tuple[float, float] | None] = lambda step: None
        self._state: Sequence[str] = ADAM_STATE
        take_norms(engine.optimizer)
        spare_reduction(engine.optimizer)
        self._skip = DeviceSkip(engine.optimizer) if applies(engine.optimizer) else None
        self._writer = CheckpointWriter(engine.checkpoint_engine)
        engine.checkpoint_engine = self._writer

    def describe_optimizer(self, state: Sequence[str], groups: Groups) -> None:
        """Say what the optimizer keeps, and tell it what its flat parameters are made of.

        Args:
            state: names of its elementwise tensors; ``step`` among them where it counts.
            groups: of data ranks and of tensor ranks.
        """
        self._state = state
        describe_flat_parts(self._engine.optimizer, self.partitions, groups)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, around the one that it was given."""
        return self._engine.optimizer

    def observe(self, observer: StepObserver) -> None:
        """Let an observer measure every step from now on."""
        self._observers.append(observer)

    def leave_optimizer_out(self) -> None:
        """Write checkpoints without the optimizer's state from now on (ZeRO 0 to 2)."""
        self._writer.optimizer = False

    def take_times(self, *, logged: Callable[[int], bool], device: torch.device) -> None:
        """Record where the time of logged steps goes, see :class:`megatron.engine.clock.StepClock`.

        Args:
            logged: whether a step is recorded.
            device: of the model.
        """
        clock = StepClock(self._engine, logged=logged, device=device)
        self._reading = clock.reading
        self.observe(clock)

    def facts(self) -> dict[str, Any]:
        """Return what DeepSpeed made of its configuration, as texts and numbers."""
        engine = self._engine
        return {
            "optimizer": type(engine.optimizer).__name__,
            "inner_optimizer": type(getattr(engine.optimizer, "optimizer", None)).__name__,
            "zero_stage": int(engine.zero_optimization_stage()),
            "parameters": {
                name: [list(parameter.shape), str(parameter.dtype)]
                for name, parameter in self.module.named_parameters()
            },
            "settings": {
                key: value if isinstance(value, int | float | str | None) else str(value)
                for key, value in vars(engine._config).items()
                if not key.startswith("_")
            },
        }

    def follow_betas(self, betas: Callable[[int], tuple[float, float] | None]) -> None:
        """Let the schedule set the decay rates of an optimizer that has them, step by step."""
        self._betas = betas

    @property
    def module(self) -> nn.Module:
        """The model (or this stage's part of it) as DeepSpeed holds it."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return int(self._engine.gradient_accumulation_steps())

    @property
    def loss_scale(self) -> float:
        """The current loss scale (1 in fp32 and bf16)."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    @property
    def steps_done(self) -> int:
        """Optimizer steps that DeepSpeed has counted, the loaded checkpoint's included."""
        return int(self._engine.global_steps)

    def train_step(
        self, step: int, micro_batches: Iterable[tuple[torch.Tensor, Any]], *, lr: float
    ) -> StepOutcome:
        """Run forward and backward on every micro-batch, then the optimizer.

        Args:
            step: number of the optimizer step, from 1.
            micro_batches: ``accumulation`` pairs of tokens [B, S] and labels, on the device.
            lr: learning rate of this step.
        """
        for observer in self._observers:
            observer.begin(step, loss_scale=self.loss_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if "betas" in group and (betas := self._betas(step)) is not None:
                group["betas"] = betas
        skipped_before = self._engine.skipped_steps
        self._train(step, self._reading(micro_batches))
        skipped: bool | torch.Tensor = self._engine.skipped_steps > skipped_before
        if self._skip is not None and self._skip.flag is not None:
            skipped = self._skip.flag
        outcome = StepOutcome(skipped=skipped, grad_norm=self._engine.get_global_grad_norm())
        statistics: dict[str, float] = {}
        for observer in self._observers:
            statistics |= observer.end(step, outcome)
        return replace(outcome, statistics=statistics)

    def settle(self, *, skipped: bool) -> None:
        """Hear on the host what came of the step: whether some rank dropped the update."""
        if self._skip is not None:
            self._engine.skipped_steps += skipped  # else DeepSpeed has counted it

    @abstractmethod
    def _train(self, step: int, micro_batches: Iterable[tuple[torch.Tensor, Any]]) -> None:
        """Run all micro-batches of a step, and the optimizer."""

    @abstractmethod
    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction | None = None,
    ) -> None:
        """Run the model on micro-batches, without gradients and dropout.

        What comes of it is what the loss function tells its observer (or keeps itself), on
        the ranks of the last stage.  Collective: every rank calls it alike.

        Args:
            micro_batches: pairs of tokens [B, S] and labels, on the device.
            count: how many there are, the same on every rank.
            loss_fn: applied instead of the model's own; takes the last layer's output and
                the labels, and returns a scalar.
        """

    def save(
        self,
        directory: Path,
        tag: str,
        client_state: Mapping[str, Any],
        *,
        write: StateWriter | None = None,
    ) -> list[Path]:
        """Write this rank's part of a checkpoint into ``directory / tag``; collective.

        Args:
            directory: folder of the checkpoint's folder.
            tag: name of the checkpoint's folder.
            client_state: goes into the files with the model's state.
            write: writes a file, or takes a copy of what it will hold: the state that it is
                given is the engine's own.  Default: ``torch.save``.

        Returns:
            The files that this rank wrote.
        """
        self._writer.written.clear()
        self._writer.write = write or write_plainly
        with self._all_experts():
            self._engine.save_checkpoint(
                str(directory), tag=tag, client_state=dict(client_state), save_latest=False
            )
        return list(self._writer.written)

    @contextlib.contextmanager
    def _all_experts(self) -> Iterator[None]:
        """Let the files that are written hold the experts of all data ranks; collective."""
        if self._experts is None:
            yield
            return
        experts = self._experts
        spread = getattr(self.module, "checkpoint_parallel_write_pipeline", False)
        others = experts.others(keep=spread or experts.writes)
        self._writer.complete = lambda state, path: experts.complete(state, path, others)
        try:
            with experts.ordinary(self._engine):
                yield
        finally:
            self._writer.complete = as_it_is

    def load(self, directory: Path, tag: str, *, weights_only: bool = False) -> None:
        """Load a checkpoint that :meth:`save` wrote in this layout.

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
        frozen = self._frozen().values() if weights_only else ()
        experts = self._experts
        plainly = contextlib.nullcontext() if experts is None else experts.ordinary(self._engine)
        with plain_path(directory) as plain, _thawed(frozen), plainly:
            path, _ = self._engine.load_checkpoint(
                str(plain),
                tag=tag,
                load_optimizer_states=not weights_only,
                load_lr_scheduler_states=False,
                load_module_only=weights_only,
                # A base model's checkpoint knows no prompt.
                load_module_strict=not frozen,
            )
        if path is None:
            raise CheckpointError(f"DeepSpeed could not load the checkpoint {directory / tag}")
        # The configuration's hyperparameters hold, not those that the checkpoint remembers.
        for group, own in zip(self._optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)

    def _frozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not trained."""
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad
        }

    def take_weights(self) -> None:
        """Let the optimizer go on from the model's weights, which somebody has set."""
        refresh = getattr(self._engine.optimizer, "refresh_fp32_params", None)
        if refresh is not None:
            refresh()

    def load_universal(
        self, folder: Path, *, tensor_rank: int, tensor_size: int, weights_only: bool = False
    ) -> None:
        """Load a checkpoint in the universal format, whatever layout it was written in.

        Args:
            folder: the checkpoint's folder.
            tensor_rank: this rank's number among those that share its layers.
            tensor_size: how many those are.
            weights_only: leave the optimizer as it was initialised.

        Raises:
            CheckpointError: it is not of this model.
        """
        checkpoint = UniversalCheckpoint(
            folder,
            partitions=self.partitions,
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
        )
        frozen = self._frozen()
        with torch.no_grad():
            for name, parameter in frozen.items():
                parameter.copy_(checkpoint.part(name, "fp32", parameter.shape))
        # A base model's checkpoint knows nothing of what is trained beside it.
        trained = self.partitions.keys() - frozen.keys()
        if not (frozen and weights_only) or checkpoint.holds(trained):
            load_universal(self._engine, checkpoint, weights_only=weights_only, state=self._state)


def tensor_partitions(model: nn.Module) -> dict[str, Partition | None]:
    """Return how tensor ranks divide each parameter; None if each of them holds all of it.

    Ask before DeepSpeed takes the model: ZeRO 3 has another use for the attribute's name.
    """
    return {
        name: getattr(parameter, "partition", None) for name, parameter in model.named_parameters()
    }


@contextlib.contextmanager
def _thawed(frozen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters pass for trained ones while a checkpoint is read in which they are."""
    parameters = list(frozen)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
