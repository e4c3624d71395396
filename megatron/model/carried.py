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
    """

    hidden: torch.Tensor
    starts: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, value: Value) -> Carried:
        """Take a value apart."""
        if isinstance(value, torch.Tensor):
            return cls(hidden=value)
        hidden, *rest = value
        whole = [part for part in rest if not part.is_floating_point()]
        floating = [part for part in rest if part.is_floating_point()]
        return cls(
            hidden=hidden,
            starts=whole[0] if whole else None,
            bias=floating[0] if floating else None,
        )

    def value(self) -> Value:
        """Put the parts together again."""
        rest = tuple(part for part in (self.starts, self.bias) if part is not None)
        return (self.hidden, *rest) if rest else self.hidden

    def with_hidden(self, hidden: torch.Tensor) -> Value:
        """Return the value with another residual stream."""
        return dataclasses.replace(self, hidden=hidden).value()
