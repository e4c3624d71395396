"""Telling DeepSpeed which parameters belong to experts that data ranks share out.

Such a parameter has copies on every e-th data rank only, and is known to DeepSpeed as an expert's:
it has groups of ranks and of parameters of its own, so that gradients are summed, norms taken and
optimizer state divided among its copies alone.  Gates, dispatch and files are ours (see
:mod:`megatron.model.experts`): DeepSpeed's layers drop tokens, draw from torch's generator, and
keep experts in files that its own conversion to the universal format cannot read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron.parallel.topology import Topology

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_PLACE = "_announced_experts"


class SharedExperts:
    """The experts of a model, of which every data rank holds some."""

    def __init__(
        self, model: nn.Module, topology: Topology, optimizer: torch.optim.Optimizer
    ) -> None:
        """Mark the model's parameters and give them parameter groups of their own; collective.

        Args:
            model: whole or a stage, with at least one block of experts.
            topology: with an expert group.
            optimizer: of the model; it has not made a step.
        """
        self._topology = topology
        self._own = {
            name: parameter
            for name, parameter in model.named_parameters()
            if getattr(parameter, "expert", False)
        }
        self._held = len({_number(name) for name in self._own})
        self._group = f"ep_size_{topology.expert_size}"
        self._register()
        for parameter in self._own.values():
            setattr(parameter, "allreduce", False)  # noqa: B010
            setattr(parameter, "group_name", self._group)  # noqa: B010
        self._divide(optimizer)

    def _register(self) -> None:
        """Let DeepSpeed know the groups of ranks; collective."""
        from deepspeed.utils import groups

        layout, rank = self._topology.layout, self._topology.rank
        groups._EXPERT_PARALLEL_GROUP[self._group] = self._topology.expert_group
        groups._EXPERT_PARALLEL_GROUP_RANKS[self._group] = _own(layout.expert_groups(), rank)
        for ranks in layout.expert_data_groups():
            # DeepSpeed takes None for all ranks, so that even one by itself is a group.
            group = dist.new_group(ranks)
            if rank in ranks:
                groups._EXPERT_DATA_PARALLEL_GROUP[self._group] = group
                groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[self._group] = ranks

    def _divide(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the experts' parameters into groups that are called as DeepSpeed wants it."""
        own = {id(parameter) for parameter in self._own.values()}
        added = []
        for group in optimizer.param_groups:
            experts = [one for one in group["params"] if id(one) in own]
            group["params"] = [one for one in group["params"] if id(one) not in own]
            if experts:
                added.append({**group, "params": experts, "name": self._group, "moe": True})
        optimizer.param_groups.extend(added)

    @property
    def writes(self) -> bool:
        """Whether this rank writes weights: of all data ranks the first does."""
        return self._topology.data_rank == 0

    @contextlib.contextmanager
    def announced(self, model: nn.Module) -> Iterator[None]:
        """Let DeepSpeed find a layer of its own kind in the model, while it takes that over."""
        from deepspeed.moe.layer import MoE

        class Announcement(MoE):  # type: ignore[misc]
            def __init__(self, number: int) -> None:
                nn.Module.__init__(self)
                self.num_experts = number

            def set_deepspeed_parallelism(self, *_: Any) -> None:
                """Make no groups: they are there."""

        model.add_module(_PLACE, Announcement(self._held * self._topology.expert_size))
        try:
            yield
        finally:
            delattr(model, _PLACE)

    @contextlib.contextmanager
    def ordinary(self, engine: Any) -> Iterator[None]:
        """Let DeepSpeed's engine save and load as it does without experts."""
        engine.has_moe_layers = False
        try:
            yield
        finally:
            engine.has_moe_layers = True

    def others(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the experts of the other ranks by name, on the host; collective.

        Args:
            keep: whether this rank wants them; otherwise it only sends its own.
        """
        ranks, place = self._topology.expert_size, self._topology.expert_rank
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._own.items():
            held = parameter.detach().contiguous()
            parts = [torch.empty_like(held) for _ in range(ranks)]
            dist.all_gather(parts, held, group=self._topology.expert_group)
            if keep:
                found |= {
                    self._renamed(name, rank - place): part.cpu()
                    for rank, part in enumerate(parts)
                    if rank != place
                }
        return found

    def complete(self, state: Any, path: str, others: dict[str, torch.Tensor]) -> Any:
        """Return what is about to be saved, with the other ranks' experts in it.

        Args:
            state: of a whole rank, or of one layer of a stage.
            path: of the file.
            others: what :meth:`others` returned.
        """
        layer = re.search(r"layer_(\d+)-model_\d+-model_states\.pt$", path)
        if layer is not None:
            prefix = f"{int(layer[1])}."
            added = {
                name.removeprefix(prefix): value
                for name, value in others.items()
                if name.startswith(prefix)
            }
            return {**state, **added}
        if not isinstance(state, dict) or "param_shapes" not in state:
            return state
        module = state.get("module")
        whole = {**module, **others} if isinstance(module, dict) and module else module
        shapes = [self._all_shapes(group) for group in state["param_shapes"] or []]
        return {**state, "module": whole, "param_shapes": shapes or state["param_shapes"]}

    def _all_shapes(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Return the shapes of a parameter group by name, with the other ranks' experts."""
        found = dict(shapes)
        for name in shapes.keys() & self._own.keys():
            for rank in range(self._topology.expert_size):
                found[self._renamed(name, rank - self._topology.expert_rank)] = shapes[name]
        return found

    def _renamed(self, name: str, ranks: int) -> str:
        """Return the name of an expert's parameter that many ranks further on."""
        return _NUMBER.sub(str(_number(name) + ranks * self._held), name)


def share_experts(
    model: nn.Module, topology: Topology, optimizer: torch.optim.Optimizer
) -> SharedExperts | None:
    """Return the experts of a model that data ranks share out; None where none are; collective."""
    if topology.expert_size == 1:
        return None
    return SharedExperts(model, topology, optimizer)


def _number(name: str) -> int:
    found = _NUMBER.search(name)
    assert found is not None, f"{name} is no expert's parameter"
    return int(found[0])


def _own(groups: list[list[int]], rank: int) -> list[int]:
    return next(ranks for ranks in groups if rank in ranks)
