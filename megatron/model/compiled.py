"""Blocks that torch.compile takes whole.

What a block computes is one function of tensors (:meth:`CompilableBlock.body`).  What else it
needs is found before: masks and angles by its places, dropout's seeds by their names.  So nothing
breaks the graph, no number that changes from step to step is part of the code, and all blocks of
one kind share it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.kv_cache import CachingModule

_DETERMINISTIC: dict[str, Any] = {"deterministic": True}
Body = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class CompiledPasses:
    """Which passes of a block run compiled, and what they must be given before.

    Attributes:
        body: the compiled :meth:`CompilableBlock.body`.
        shape: (B, S) of a micro-batch as a block sees it.  Passes of other shapes (a prompt, a
            last batch) are not compiled, or every new shape would cost seconds.
        dropouts: those that drop something.
        caches: modules that may have a cache attached, under which nothing is compiled.
    """

    body: Body
    shape: tuple[int, int]
    dropouts: tuple[Dropout, ...]
    caches: tuple[CachingModule, ...]

    def takes(self, hidden: torch.Tensor) -> bool:
        """Tell whether a pass runs compiled."""
        return tuple(hidden.shape[:2]) == self.shape and all(
            user.cache is None for user in self.caches
        )


class CompilableBlock(nn.Module):
    """A transformer block, compiled in place or not: parameters keep their names."""

    def __init__(self) -> None:
        """Begin uncompiled."""
        super().__init__()
        self._passes: CompiledPasses | None = None

    @abstractmethod
    def body(self, hidden: torch.Tensor, *aids: Any) -> Any:
        """Return what the block makes of the residual stream: arithmetic on tensors alone."""

    def compiled_aids(self) -> tuple[Any, ...]:
        """Return what :meth:`body` is given besides where it is compiled."""
        return ()

    def draws(self, device: torch.device) -> AbstractContextManager[None]:
        """Let torch's generator be this block's own inside the ``with`` block, if it draws."""
        return nullcontext()

    def compile_body(self, *, rows: int, length: int, deterministic: bool = False) -> None:
        """Compile passes of one shape from now on; the work is done at the first of them.

        See :func:`compile_blocks`.
        """
        options = _DETERMINISTIC if deterministic and _offers_determinism() else None
        modules = list(self.modules())
        self._passes = CompiledPasses(
            body=torch.compile(self.body, fullgraph=True, dynamic=False, options=options),
            shape=(rows, length),
            dropouts=tuple(part for part in modules if isinstance(part, Dropout) and part.rate),
            caches=tuple(part for part in modules if isinstance(part, CachingModule)),
        )

    def run(self, hidden: torch.Tensor, *aids: Any) -> Any:
        """Call :meth:`body`, compiled where it is."""
        passes = self._passes
        if passes is None or not passes.takes(hidden):
            return self.body(hidden, *aids)
        if self.training:
            for dropout in passes.dropouts:
                dropout.prepare(hidden.device)
        with self.draws(hidden.device):
            return passes.body(hidden, *aids, *self.compiled_aids())


def compile_blocks(model: nn.Module, *, rows: int, length: int, deterministic: bool = False) -> int:
    """Let every block of a model, or of a pipeline's stage, run compiled.

    Args:
        model: with the blocks somewhere inside.
        rows: samples of a micro-batch.
        length: tokens of a sample that a block sees: this rank's part where the sequence is
            divided.
        deterministic: choose among kernels by rules and not by timing them, which a GPU's
            reductions are chosen by; on a CPU nothing is.

    Returns:
        How many there are.
    """
    blocks = [module for module in model.modules() if isinstance(module, CompilableBlock)]
    # All share the code that is compiled, and might be of as many kinds: two passes of each.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks) + 8)
    for block in blocks:
        block.compile_body(rows=rows, length=length, deterministic=deterministic)
    return len(blocks)


def _offers_determinism() -> bool:
    return "deterministic" in torch._inductor.list_options()
