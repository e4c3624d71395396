"""Running a list of layers in order, some of them recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megatron.model.spec import ModelSpec
from megatron.parallel.rng import DropoutRng

LayerFunction = Callable[[Any], Any]
"""What a layer does to what the one before it returned."""


def recomputed_blocks(spec: ModelSpec) -> int:
    """Return how many blocks are recomputed together; 0 = none is."""
    return spec.checkpoint_num_layers if spec.checkpoint_activations else 0


class LayerRun:
    """The layers of a whole model, or of one pipeline stage, applied one after the other.

    Neighbouring layers that may be recomputed keep only the first one's input and run again
    in backward (Chen et al. 2016), with the dropout masks of their own micro-batch.
    """

    def __init__(
        self,
        functions: Sequence[tuple[LayerFunction, bool]],
        *,
        dropout: DropoutRng,
        recomputed: int,
    ) -> None:
        """Keep the layers.

        Args:
            functions: each layer, and whether it may be recomputed.
            dropout: source of the dropout masks.
            recomputed: how many layers are recomputed together; 0 = none is.
        """
        self._functions = [function for function, _ in functions]
        self._dropout = dropout
        self._groups = _groups(functions, recomputed) if recomputed else None

    def __call__(self, value: Any) -> Any:
        """Return the last layer's output for the first one's input."""
        if self._groups is None or not torch.is_grad_enabled():
            return _run(self._functions, value)
        for group, recompute in self._groups:
            run = partial(_run, group)
            value = self._dropout.recomputed(run, value) if recompute else run(value)
        return value


def _groups(
    functions: Sequence[tuple[LayerFunction, bool]], size: int
) -> list[tuple[list[LayerFunction], bool]]:
    """Gather at most ``size`` neighbours that are recomputed together."""
    groups: list[tuple[list[LayerFunction], bool]] = []
    for function, recomputable in functions:
        if recomputable and groups and groups[-1][1] and len(groups[-1][0]) < size:
            groups[-1][0].append(function)
        else:
            groups.append(([function], recomputable))
    return groups


def _run(functions: Sequence[LayerFunction], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value
