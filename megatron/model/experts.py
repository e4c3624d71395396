"""Many MLPs in the place of one: a token goes to few of them (Shazeer et al. 2017).

No token is dropped: an expert takes as many as come, so that what becomes of a token does not
depend on the others, on the batch or on the layout.  Rows are sorted by expert, sent to the data
ranks that hold them where these share experts out, and come back the same way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.model.init import initializer
from megatron.model.mlp import FeedForward
from megatron.model.router import Routed, Router
from megatron.model.spec import ModelSpec, ffn_width
from megatron.parallel.experts import from_experts, to_experts
from megatron.parallel.parameters import Initializer, ParameterScope, zeros
from megatron.parallel.partition import Partition
from megatron.parallel.rng import DropoutRng
from megatron.parallel.sequence import enter_shared, gather_sequence, leave_shared


class ExpertLinear(nn.Module):
    """This tensor rank's part of a linear layer of one expert; nothing is sent in here.

    Attributes:
        weight: ``[outputs, inputs]`` of this rank.
        bias: of this rank's outputs; where ranks divide the inputs, the whole one on each of
            them, of which each adds its share.
    """

    def __init__(
        self,
        scope: ParameterScope,
        *,
        inputs: int,
        outputs: tuple[int, ...],
        cut: Partition,
        initializer: Initializer,
        bias: bool,
    ) -> None:
        """Make the layer; sizes are full ones, ``cut`` is how tensor ranks divide the weight."""
        super().__init__()
        total = sum(outputs)
        self.share = scope.topology.tensor_size if cut.dim == 1 else 1
        self.weight = scope.parameter("weight", (total, inputs), initializer, cut)
        by_output = cut if cut.dim == 0 else None
        self.bias = scope.parameter("bias", (total,), zeros, by_output) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[R, inputs]`` to ``[R, outputs]``, or to this rank's term of the sum."""
        if self.bias is None or self.share == 1:
            return F.linear(x, self.weight, self.bias)
        # Its value is shared out; the gradient is the same on every rank, and whole.
        value = self.bias.detach()
        return F.linear(x, self.weight, value / self.share + (self.bias - value))


class Expert(FeedForward):
    """One MLP; maps ``[R, hidden]`` to this tensor rank's term of ``[R, hidden]``."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the expert."""
        super().__init__(spec)
        width, hidden = ffn_width(spec), spec.hidden_size
        inner = (width, width) if self.gated else (width,)
        self.dense_h_to_4h = ExpertLinear(
            scope.child("dense_h_to_4h"),
            inputs=hidden,
            outputs=inner,
            cut=Partition(dim=0, blocks=inner),
            initializer=initializer(spec.init_method, spec),
            bias=spec.use_bias_in_mlp,
        )
        self.dense_4h_to_h = ExpertLinear(
            scope.child("dense_4h_to_h"),
            inputs=width,
            outputs=(hidden,),
            cut=Partition(dim=1, blocks=(width,)),
            initializer=initializer(
                spec.output_layer_init_method, spec, field="output_layer_init_method"
            ),
            bias=spec.use_bias_in_mlp,
        )


class ExpertLoad:
    """What a step's tokens asked of the experts of one block, added up on the device."""

    def __init__(self) -> None:
        """Start at 0."""
        self._sums: torch.Tensor | None = None

    def add(self, counts: torch.Tensor, balance: torch.Tensor, z: torch.Tensor) -> None:
        """Add one micro-batch: choices by expert, and the two losses."""
        losses = torch.stack([balance.float(), z.float(), torch.ones_like(z)])
        sums = torch.cat([counts.double(), losses.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> torch.Tensor | None:
        """Return choices by expert, the two losses and the micro-batches, and start afresh.

        Returns:
            float64 ``[E + 3]``, or None if nothing was added.
        """
        taken, self._sums = self._sums, None
        return taken


class MixtureOfExperts(nn.Module):
    """Router and experts of one block.

    Attributes:
        experts: those that this rank holds, by their number.
        load: what was asked of all experts.
    """

    def __init__(
        self, scope: ParameterScope, spec: ModelSpec, *, layer: int, rng: DropoutRng
    ) -> None:
        """Make the experts of block ``layer`` that this rank holds."""
        super().__init__()
        self.topology, self.rng = scope.topology, rng
        self.number, self.layer = spec.moe_num_experts, layer
        self.balance_coeff = spec.moe_loss_coeff or 0.0
        self.z_coeff = spec.moe_z_loss_coeff
        self.router = Router(scope.child("router"), spec, layer=layer, rng=rng)
        held = self.number // self.topology.expert_size
        first = self.topology.expert_rank * held
        place = scope.child("experts")
        self.experts = nn.ModuleDict(
            {str(one): Expert(place.child(str(one)), spec) for one in range(first, first + held)}
        )
        if self.topology.expert_size > 1:
            for parameter in self.experts.parameters():
                # Read by the engine: its copies are on some of the data ranks only.
                setattr(parameter, "expert", True)  # noqa: B010
            experts: Any = self.experts
            experts.register_load_state_dict_pre_hook(_leave_others_out)
        self.load = ExpertLoad()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``[B, S, hidden]`` (or this rank's part of the sequence) to the same shape.

        Returns:
            The result, and in training what is added to the loss, ``[1]``.
        """
        routed = Routed(*self.router(x))
        y, counts = self._mixed(x, routed)
        if routed.balance is None or routed.z is None:
            return y, None
        if not self.rng.recomputing:
            self.load.add(counts, routed.balance.detach(), routed.z.detach())
        loss = self.balance_coeff * routed.balance.float() + self.z_coeff * routed.z
        return y, loss[None]

    def _mixed(self, x: torch.Tensor, routed: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the chosen experts' results, and choices by expert ``[E]``."""
        whole = enter_shared(x, self.topology)
        weights = enter_shared(routed.weights, self.topology)
        experts = gather_sequence(routed.experts, self.topology)
        chosen, hidden = experts.shape[-1], whole.shape[-1]
        order = experts.flatten().argsort(stable=True)
        numbers = torch.arange(self.number, device=x.device)
        counts = (experts.flatten() == numbers[:, None]).sum(dim=1)
        copies = whole.reshape(-1, 1, hidden).expand(-1, chosen, -1).reshape(-1, hidden)
        arrived = to_experts(copies[order], counts, self.topology)
        # An expert that nobody asks for runs too: its gradient is 0, not missing, and under
        # ZeRO 3 its weights are gathered on all ranks or on none.
        own = torch.split(arrived.rows, arrived.counts)
        parts = zip(self.experts.values(), own, strict=True)
        result = torch.cat([expert(rows) for expert, rows in parts])
        returned = from_experts(result, arrived, self.topology)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        each = returned[back].view(*experts.shape, hidden)
        return leave_shared((each * weights[..., None]).sum(dim=-2), self.topology), counts


def _leave_others_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pass over the experts of a checkpoint that other ranks hold."""
    held = set(dict(module.named_children()))
    for name in [name for name in state if name.startswith(prefix)]:
        number = name[len(prefix) :].partition(".")[0]
        if number.isdigit() and number not in held:
            del state[name]
