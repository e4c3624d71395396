"""Continuing token sequences with a model that may be divided among ranks.

Every rank of a pipeline and of a tensor group gets the same logits and draws the same token,
so nothing but logits travels.  Prompts of different length stand side by side, each with
positions of its own; keys and values of earlier tokens are kept (see
:mod:`megatron.model.kv_cache`), or every token runs the whole sequence again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron.engine.runtime import sum_on_host
from megatron.errors import DataError
from megatron.inference.model import InferenceModel
from megatron.inference.sample import Sampling
from megatron.model.kv_cache import KVCache
from megatron.parallel.collectives import broadcast_from_last_stage, gather_last_dimension
from megatron.parallel.sequence import enter_shared
from megatron.parallel.topology import Topology

IntArray = npt.NDArray[np.int64]
Ended = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is continued.

    Attributes:
        tokens: token ids, at least one.
        number: of the prompt among all; its draws depend on it, and not on its place in a batch.
        new_tokens: longest continuation.
    """

    tokens: Sequence[int]
    number: int
    new_tokens: int


@dataclass(kw_only=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        tokens: without the prompt and the stop token.
        finished: whether it came to an end before it was as long as allowed.
        logits: of every token id for each of ``tokens``, where they were asked for.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    logits: list[list[float]] = field(default_factory=list)


class NextTokenLogits:
    """Stands in for the loss function and keeps the logits at one position of every row.

    Args:
        topology: this rank's place.
        rows: sequences in a batch.
        vocab_size: token ids, without padding.
        padded_vocab_size: rows of the output weight, all tensor ranks together.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        topology: Topology,
        rows: int,
        vocab_size: int,
        padded_vocab_size: int,
        device: torch.device,
    ) -> None:
        """Make room for the logits of one batch."""
        self._topology = topology
        self._vocab_size = vocab_size
        self._logits = torch.zeros(rows, padded_vocab_size, device=device)

    def __call__(self, output: Any, labels: Any) -> torch.Tensor:
        """Keep the logits at ``labels[0]`` (int64 ``[B]``); returns a scalar, as a loss would."""
        part, weight = output
        hidden = enter_shared(part, self._topology)
        (positions,) = labels
        rows = torch.arange(len(positions), device=hidden.device)
        own = hidden[rows, positions] @ weight.T
        self._logits.copy_(gather_last_dimension(own, self._topology))
        return self._logits.new_zeros(())

    def take(self) -> npt.NDArray[np.float32]:
        """Return the logits ``[B, V]`` on every rank of the pipeline; collective."""
        broadcast_from_last_stage(self._logits, self._topology)
        return self._logits[:, : self._vocab_size].cpu().numpy()


def generate(
    model: InferenceModel,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    stop_token: int | None = None,
    ended: Ended | None = None,
    recompute: bool = False,
    logits: bool = False,
) -> list[Continuation]:
    """Continue a batch of prompts.

    Collective: all ranks call it alike; ranks of one pipeline or tensor group give the same
    prompts.  Data ranks may give different ones, and more or fewer.

    Args:
        model: what continues them.
        prompts: any number of them.
        sampling: how tokens are drawn; the most probable if not given.
        stop_token: ends a continuation.
        ended: told of a continuation after each token, says whether it ends there.
        recompute: run the whole sequence for every token.
        logits: keep the logits.

    Raises:
        DataError: a prompt is empty, holds an unknown id, or leaves no room to go on.
    """
    for prompt in prompts:
        _check(model, prompt)
    batch = _Batch(model, prompts)
    sampling = sampling or Sampling()
    with batch.ready(recompute=recompute):
        while not batch.over():
            found = batch.next_logits()
            for row in np.flatnonzero(~batch.finished).tolist():
                drawn = sampling.draw(
                    found[row], row=prompts[row].number, position=batch.drawn(row)
                )
                batch.add(row, drawn, stop=drawn == stop_token, ended=ended)
                if logits and drawn != stop_token:
                    batch.result[row].logits.append(found[row].tolist())
    return batch.result


class _Batch:
    """The rows of a batch on their way."""

    def __init__(self, model: InferenceModel, prompts: Sequence[Prompt]) -> None:
        # A data rank without a prompt of its own keeps step with the others.
        rows = list(prompts) or [Prompt(tokens=[0], number=0, new_tokens=0)]
        self._model = model
        self.result = [Continuation() for _ in prompts]
        self._allowed = np.array([prompt.new_tokens for prompt in rows])
        self._lengths = np.array([len(prompt.tokens) for prompt in rows])
        self._starts = self._lengths.copy()
        # One length for all passes over whole sequences: stages tell each other a shape once.
        self._width = model.padded(int((self._lengths + self._allowed).max()))
        self._tokens: IntArray = np.zeros((len(rows), self._width), dtype=np.int64)
        for row, prompt in enumerate(rows):
            self._tokens[row, : len(prompt.tokens)] = prompt.tokens
        self.finished = self._allowed < 1
        self._cache: KVCache | None = None
        self._begun = False
        self._logits = NextTokenLogits(
            topology=model.topology,
            rows=len(rows),
            vocab_size=model.vocab_size,
            padded_vocab_size=model.padded_vocab_size,
            device=model.device,
        )

    @contextlib.contextmanager
    def ready(self, *, recompute: bool) -> Iterator[None]:
        """Attach a cache, unless everything is recomputed."""
        if recompute:
            yield
            return
        room = self._width + self._model.padded(1)
        self._cache = KVCache(rows=len(self._tokens), capacity=room)
        with self._cache.attached(self._model.model.module):
            yield

    def over(self) -> bool:
        """Tell whether all rows of all data ranks are finished; collective."""
        going = np.array([np.count_nonzero(~self.finished)], dtype=np.int64)
        return int(sum_on_host(going, self._model.topology.host_data_group)[0]) == 0

    def drawn(self, row: int) -> int:
        """Return how many tokens a row's continuation has."""
        return int(self._lengths[row] - self._starts[row])

    def add(self, row: int, token: int, *, stop: bool, ended: Ended | None) -> None:
        """Put a token behind a row, or end the row."""
        result = self.result[row]
        if not stop:
            self._tokens[row, self._lengths[row]] = token
            self._lengths[row] += 1
            result.tokens.append(token)
        result.finished = stop or (ended is not None and ended(result.tokens))
        self.finished[row] = result.finished or self.drawn(row) == self._allowed[row]

    def next_logits(self) -> npt.NDArray[np.float32]:
        """Return the logits of every row's next token, ``[B, V]``; collective."""
        if self._cache is None:
            tokens, positions = self._tokens, self._lengths - 1
        elif not self._begun:
            # Behind a short prompt stands padding, unseen until tokens of its own come there.
            width = self._model.padded(int(self._lengths.max()))
            slots = np.broadcast_to(np.arange(width), (len(self._tokens), width))
            tokens, positions = self._tokens[:, :width], self._lengths - 1
            self._cache.advance(torch.from_numpy(slots.copy()))
        else:
            width = self._model.padded(1)
            slots = self._lengths[:, None] - 1 + np.arange(width)
            tokens = np.zeros_like(slots)
            tokens[:, 0] = self._tokens[np.arange(len(tokens)), self._lengths - 1]
            positions = np.zeros_like(self._lengths)
            self._cache.advance(torch.from_numpy(slots))
        self._begun = True
        batch = iter([_micro_batch(tokens, positions, self._model.device)])
        self._model.model.evaluate(batch, 1, loss_fn=self._logits)
        return self._logits.take()


def _micro_batch(
    tokens: IntArray, positions: IntArray, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor]]:
    return (
        torch.from_numpy(tokens.copy()).to(device),
        (torch.from_numpy(positions.copy()).to(device),),
    )


def _check(model: InferenceModel, prompt: Prompt) -> None:
    name, length = f"prompt {prompt.number}", len(prompt.tokens)
    if not length:
        raise DataError(f"{name} is empty; give it at least one token")
    model.check_ids(prompt.tokens, name)
    if length + prompt.new_tokens > model.longest:
        raise DataError(
            f"{name} has {length} tokens and {prompt.new_tokens} are wanted, but the model takes "
            f"{model.longest} in all; shorten the prompt, or ask for fewer tokens"
        )
