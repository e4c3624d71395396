"""What one layer hands to the next: the residual stream, and what some positions need beside it.

With most positions that is one tensor.  Where attention ends with the document, or a learned bias
is shared by all blocks, it is a tuple of tensors, which a pipeline sends from stage to stage as
it sends one: whole numbers go forward only, floating-point ones bring their gradients back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

Value = torch.Tensor | tuple[torch.Tensor, ...]
"""As layers exchange it; see :class:`Carried` for its parts."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The parts of a value.

    Attributes:
        hidden: ``[B, S, hidden]``, or this rank's part of the sequence where it is divided.
        starts: slot at which the document of each token begins, int64 ``[B, S]`` (all of S).
        bias: of this rank's heads by distance, ``[heads, S]`` (see
            :mod:`megatron.model.relative`).
        extra_loss: what the blocks so far add to the loss that is trained, float32 ``[1]``
            (see :mod:`megatron.model.router`).
    """

    hidden: torch.Tensor
    starts: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    extra_loss: torch.Tensor | None = None

    @classmethod
    def of(cls, value: Value) -> Carried:
        """Take a value apart."""
        if isinstance(value, torch.Tensor):
            return cls(hidden=value)
        hidden, *rest = value
        whole = [part for part in rest if not part.is_floating_point()]
        floating = {part.dim(): part for part in rest if part.is_floating_point()}
        return cls(
            hidden=hidden,
            starts=whole[0] if whole else None,
            bias=floating.get(2),
            extra_loss=floating.get(1),
        )

    def value(self) -> Value:
        """Put the parts together again."""
        parts = (self.starts, self.bias, self.extra_loss)
        rest = tuple(part for part in parts if part is not None)
        return (self.hidden, *rest) if rest else self.hidden

    def with_hidden(self, hidden: torch.Tensor, loss: torch.Tensor | None = None) -> Value:
        """Return the value with another residual stream, and with a loss added to the others."""
        total = self.extra_loss
        if total is not None and loss is not None:
            total = total + loss
        return dataclasses.replace(self, hidden=hidden, extra_loss=total).value()
