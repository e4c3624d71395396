"""Gradients of single examples with respect to LoRA parameters, and what Adam makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from megatron.data.samples import UNTRAINED
from megatron.selection.devices import enough_memory
from megatron.selection.less_examples import Example
from megatron.selection.lora_model import LoraModel

GradientType = Literal["adam", "sgd", "sign"]
BETA_1: Final = 0.9
BETA_2: Final = 0.999
EPSILON: Final = 1e-8
_MOST_NUMBERS: Final = 1 << 28


@dataclass(frozen=True, kw_only=True)
class LoraState:
    """Adapters after some steps of AdamW, and its moments; all of it laid end to end.

    Attributes:
        values: [size] parameters.
        first: [size] exponential mean of gradients.
        second: [size] exponential mean of their squares.
        step: how many steps there have been.
        rate: mean learning rate of the epoch that ended here.
    """

    values: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    step: int
    rate: float


def precondition(gradients: torch.Tensor, state: LoraState, kind: GradientType) -> torch.Tensor:
    """Return the update that the optimizer would make of each example alone, but for the rate.

    ``adam``: Γ = m / (√v + ε) with m = (β₁·m_t + (1 − β₁)·g) / (1 − β₁^(t+1)) and v alike of the
    squares (Xia et al. 2024, section 2.1): what AdamW's next step would be, with the opposite
    sign.  ``sgd``: g itself.  ``sign``: its signs.

    Args:
        gradients: [n, size].
        state: with the moments before that step.
        kind: one of the three.
    """
    if kind == "sgd":
        return gradients
    if kind == "sign":
        return gradients.sign()
    first = BETA_1 * state.first + (1 - BETA_1) * gradients
    second = BETA_2 * state.second + (1 - BETA_2) * gradients.square()
    done = state.step + 1
    return (first / (1 - BETA_1**done)) / ((second / (1 - BETA_2**done)).sqrt() + EPSILON)


def example_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the learned tokens of each row, [n].

    Args:
        logits: [n, s, vocabulary].
        labels: int64 [n, s], -100 where nothing is learned.
    """
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=UNTRAINED, reduction="none"
    )
    return losses.sum(dim=1) / (targets != UNTRAINED).sum(dim=1)


def padded(examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, int64 [n, longest]; what fills rows up is seen by nothing."""
    shape = len(examples), max(len(one.tokens) for one in examples)
    tokens, labels = np.zeros(shape, dtype=np.int64), np.full(shape, UNTRAINED, dtype=np.int64)
    for row, one in enumerate(examples):
        tokens[row, : len(one.tokens)], labels[row, : len(one.labels)] = one.tokens, one.labels
    return torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device)


def by_length(sizes: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield numbers of examples of like lengths, the longest first.

    Args:
        sizes: tokens of each.
        tokens: of a batch, padding included; one example is allowed whatever its length.
    """
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * sizes[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class ExampleGradients:
    """Takes the gradient of every example's mean loss, many examples at a time."""

    def __init__(self, lora: LoraModel, *, batch_tokens: int) -> None:
        """Take them of ``lora``.

        Args:
            lora: the model.
            batch_tokens: read in one pass; decides memory alone.
        """
        self._lora, self._tokens = lora, batch_tokens
        self._together = True

    def each(
        self, examples: Sequence[Example], values: torch.Tensor
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield numbers of examples and their gradients, [n, size] float32.

        As many are yielded at once as fit into a gigabyte: projecting them costs the same for one
        as for many.

        Args:
            examples: with something to learn each.
            values: [size] parameters at which the gradients are taken.
        """
        parameters = self._lora.unpack(values.to(self._lora.device))
        most = max(1, _MOST_NUMBERS // self._lora.size)
        numbers: list[int] = []
        found: list[torch.Tensor] = []
        for batch in by_length([len(one.tokens) for one in examples], self._tokens):
            for first in range(0, len(batch), most):
                part = batch[first : first + most]
                if numbers and len(numbers) + len(part) > most:
                    yield numbers, torch.cat(found)
                    numbers, found = [], []
                numbers = numbers + part
                with enough_memory():
                    gradients = self._gradients(parameters, [examples[n] for n in part])
                found.append(gradients)
        if numbers:
            yield numbers, torch.cat(found)

    def _gradients(
        self, parameters: dict[str, torch.Tensor], examples: Sequence[Example]
    ) -> torch.Tensor:
        tokens, labels = padded(examples, self._lora.device)
        taken: Callable[..., dict[str, torch.Tensor]] = grad(self._loss)
        if self._together and len(examples) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of operations that vmap does one by one
                    each = vmap(taken, in_dims=(None, 0, 0))(parameters, tokens, labels)
                return self._flat(each, len(examples))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, NotImplementedError):
                # Some models decide by what is in a tensor, which vmap cannot: one by one, then.
                self._together = False
        rows = [
            self._flat(taken(parameters, tokens[row], labels[row]), None)
            for row in range(len(examples))
        ]
        return torch.stack(rows)

    def _loss(
        self, parameters: dict[str, torch.Tensor], tokens: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": tokens[None], "use_cache": False}
        output: Any = functional_call(self._lora.model, parameters, (), inputs)
        return example_losses(output.logits, labels[None])[0]

    def _flat(self, gradients: dict[str, torch.Tensor], rows: int | None) -> torch.Tensor:
        shape = (-1,) if rows is None else (rows, -1)
        parts = [gradients[name].detach().reshape(shape) for name in self._lora.names]
        return torch.cat(parts, dim=-1).float()
