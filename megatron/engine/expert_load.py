"""What the steps' tokens asked of every block's experts, and the losses that balance them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatron.engine.observer import StepOutcome
from megatron.model.experts import MixtureOfExperts
from megatron.parallel.topology import Topology

LOAD, BALANCE, Z = "expert_load", "moe_balance_loss", "moe_z_loss"


class ExpertLoads:
    """Sums over all ranks on logged steps; see :class:`megatron.engine.observer.StepObserver`.

    ``expert_load/BLOCK.EXPERT`` is the share of a block's choices that fell on an expert (blocks
    as ``moe_expert_interval`` counts them, from 0); the losses are means over the blocks, without
    their factors: a balancing loss of 1 says that all experts are used alike.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        *,
        blocks: Sequence[int],
        experts: int,
        logged: Callable[[int], bool],
        device: torch.device,
    ) -> None:
        """Take the model.

        Args:
            model: whole or a stage.
            topology: this rank's place.
            blocks: numbers of all blocks with experts, on whatever stage.
            experts: of each of them.
            logged: whether a step is measured.
            device: where the ranks' sums are added.
        """
        self._held = [one for one in model.modules() if isinstance(one, MixtureOfExperts)]
        self._topology, self._blocks, self._experts = topology, list(blocks), experts
        self._logged, self._device = logged, device

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Forget what ran before the step."""
        for one in self._held:
            one.load.take()

    @torch.no_grad()
    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Return the step's numbers by name; nothing if it is not logged."""
        if not self._logged(step):
            return {}
        table = torch.zeros(len(self._blocks), self._experts + 3, dtype=torch.float64)
        table = table.to(self._device)
        for one in self._held:
            if (seen := one.load.take()) is not None and self._counts(seen):
                table[self._blocks.index(one.layer)] += seen
        if dist.is_initialized():
            dist.all_reduce(table)
        host = table.cpu()
        counts, losses = host[:, : self._experts], host[:, self._experts :]
        shares = counts / counts.sum(dim=1, keepdim=True)
        means = (losses[:, :2] / losses[:, 2:]).mean(dim=0)
        result = {BALANCE: float(means[0]), Z: float(means[1])}
        for block, row in zip(self._blocks, shares.tolist(), strict=True):
            result |= {f"{LOAD}/{block}.{number}": share for number, share in enumerate(row)}
        return result

    def _counts(self, seen: torch.Tensor) -> bool:
        """Tell whether this rank adds; of tensor ranks that divide the sequence each does.

        Each of those has its part of the losses and all choices, whose shares are the same then.
        """
        if self._topology.tensor_rank == 0:
            return True
        seen[-1] = 0.0  # the micro-batch is counted once
        return self._topology.splits_sequence
