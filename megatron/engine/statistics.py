"""Norms of every parameter, its gradient and its optimizer state, under any ZeRO stage.

They are summed from the flat parts that the optimizer updates, so that no parameter has to be
put together: each rank adds squares of what it holds, and one sum over all ranks does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.fragments import Fragment, flat_parts
from megatron.engine.observer import StepOutcome
from megatron.parallel.partition import Partition

GRADIENTS, PARAMETERS = "gradient_norms", "parameter_norms"
ZEROS, STATES = "pct_grad_zeros", "optimizer_state_norms"
_COUNT, _PADDING = "count", "padding"


class ParameterStatistics:
    """Measures parameters on logged steps; see :class:`megatron.engine.observer.StepObserver`."""

    def __init__(
        self,
        optimizer: Any,
        *,
        names: Sequence[str],
        partitions: Mapping[str, Partition | None],
        counts: Callable[[str], bool],
        wanted: Sequence[str],
        state: Sequence[str],
        clipping: float,
        logged: Callable[[int], bool],
        device: torch.device,
    ) -> None:
        """Hook into the optimizer.

        Args:
            optimizer: DeepSpeed's, of ZeRO 1 to 3.
            names: of all parameters of the whole model, in the same order on every rank.
            partitions: how tensor ranks divide each parameter, by name.
            counts: whether this rank's copy of a parameter counts: of what several ranks hold
                alike one copy does.
            wanted: which of the four groups of numbers are measured.
            state: names of the optimizer's elementwise tensors.
            clipping: largest norm of the whole gradient; 0 = none.
            logged: whether a step is measured.
            device: where the ranks' sums are added.
        """
        self._optimizer = optimizer
        self._names = {name: place for place, name in enumerate(names)}
        self._partitions, self._counts = partitions, counts
        self._wanted, self._state = tuple(wanted), tuple(state)
        self._clipping, self._logged, self._device = clipping, logged, device
        self._keys = [_COUNT, _PADDING, GRADIENTS, ZEROS, PARAMETERS]
        self._keys += [f"{STATES}_{name}" for name in self._state]
        self._active = False
        self._held: list[tuple[torch.Tensor, Fragment]] = []
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        optimizer.optimizer.register_step_pre_hook(self._before_update)

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Watch the step's gradients if it is logged."""
        self._active = self._logged(step)
        self._sums = {}
        # While it updates one group, DeepSpeed hides the others.
        self._held = list(self._counted()) if self._active else []

    @torch.no_grad()
    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Return the step's numbers by name; nothing if it is not logged."""
        if not self._active:
            return {}
        self._active = False
        if PARAMETERS in self._wanted or STATES in self._wanted:
            self._measure_held()
        table = self._table()
        self._sums, self._held = {}, []
        return self._named(table, 1.0 if outcome.skipped else self._clipped_by(outcome.grad_norm))

    @torch.no_grad()
    def _before_update(self, optimizer: Any, *_: Any) -> None:
        """Add up the gradients of the flat parameters that are about to be updated."""
        if not self._active or not ({GRADIENTS, ZEROS} & set(self._wanted)):
            return
        present = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for flat, one in self._held:
            if id(flat) in present and flat.grad is not None:
                part = flat.grad.reshape(-1).narrow(0, one.offset, one.size)
                self._add(GRADIENTS, one.name, part.double().square().sum())
                self._add(ZEROS, one.name, (part == 0).sum().double())

    def _measure_held(self) -> None:
        states = self._optimizer.optimizer.state
        for flat, one in self._held:
            held = {PARAMETERS: flat.data}
            if STATES in self._wanted and flat in states:
                held |= {f"{STATES}_{name}": states[flat].get(name) for name in self._state}
            for key, value in held.items():
                if value is not None and value.shape == flat.shape:
                    part = value.reshape(-1).narrow(0, one.offset, one.size)
                    self._add(key, one.name, part.double().square().sum())

    def _counted(self) -> Iterator[tuple[torch.Tensor, Fragment]]:
        for part in flat_parts(self._optimizer):
            for one in part.fragments:
                if self._counts(one.name):
                    yield part.flat, one

    def _add(self, key: str, name: str, value: torch.Tensor) -> None:
        before = self._sums.get((key, name))
        self._sums[key, name] = value if before is None else before + value

    def _table(self) -> torch.Tensor:
        """Return the sums over all ranks [keys, parameters]; collective."""
        table = torch.zeros(len(self._keys), len(self._names), dtype=torch.float64)
        for _, one in self._held:
            table[0, self._names[one.name]] += one.size
            table[1, self._names[one.name]] += one.size * self._padded_share(one.name)
        for (key, name), value in self._sums.items():
            table[self._keys.index(key), self._names[name]] = float(value)
        table = table.to(self._device)
        if dist.is_initialized():
            dist.all_reduce(table)
        return table.cpu()

    def _clipped_by(self, grad_norm: float | torch.Tensor | None) -> float:
        """Return by how much DeepSpeed's clipping divided the gradient."""
        if not self._clipping or grad_norm is None:
            return 1.0
        return max(1.0, (float(grad_norm) + 1e-6) / self._clipping)

    def _named(self, table: torch.Tensor, clipped: float) -> dict[str, float]:
        result: dict[str, float] = {}
        seen = bool(table[self._keys.index(GRADIENTS)].any())
        for name, place in self._names.items():
            count = float(table[0, place])
            if count == 0:  # not trained
                continue
            values = dict(zip(self._keys, table[:, place].tolist(), strict=True))
            if GRADIENTS in self._wanted and seen:
                result[f"{GRADIENTS}/{name}"] = values[GRADIENTS] ** 0.5 * clipped
            if ZEROS in self._wanted and seen:
                padding = values[_PADDING]
                share = (values[ZEROS] - padding) / (count - padding)
                result[f"{ZEROS}/{name}"] = 100.0 * share
            if PARAMETERS in self._wanted:
                result[f"{PARAMETERS}/{name}"] = values[PARAMETERS] ** 0.5
            if STATES in self._wanted:
                for key in self._state:
                    result[f"{STATES}/{name}_{key}"] = values[f"{STATES}_{key}"] ** 0.5
        return result

    def _padded_share(self, name: str) -> float:
        """Return which share of a parameter's numbers only pads the vocabulary."""
        partition = self._partitions.get(name)
        if partition is None or partition.padded_from is None:
            return 0.0
        return 1.0 - partition.padded_from / sum(partition.blocks)
