"""Continuing token sequences with a model that may be divided among ranks.

Every rank of a pipeline and of a tensor group gets the same logits and draws the same token,
so nothing but logits travels.  Sequences are run whole for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron.engine.engine import TrainEngine
from megatron.errors import DataError
from megatron.inference.sample import Sampling
from megatron.parallel.collectives import broadcast_from_last_stage, gather_last_dimension
from megatron.parallel.sequence import enter_shared
from megatron.parallel.topology import Topology


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
    engine: TrainEngine,
    prompts: Sequence[Sequence[int]],
    *,
    topology: Topology,
    vocab_size: int,
    padded_vocab_size: int,
    seq_length: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_token: int | None = None,
    device: torch.device | None = None,
) -> list[list[int]]:
    """Return every prompt's continuation (without the prompt, and without the stop token).

    Collective: all ranks call it alike; ranks of one pipeline or tensor group give the same
    prompts.  Data ranks may give different ones, if they are as many.

    Args:
        engine: holds the model.
        prompts: token ids of each prompt, at least one.
        topology: this rank's place.
        vocab_size: token ids.
        padded_vocab_size: rows of the output weight, all tensor ranks together.
        seq_length: longest sequence that the model takes, in tokens.
        max_new_tokens: longest continuation.
        sampling: how tokens are drawn; the most probable if not given.
        stop_token: ends a continuation.
        device: where the model is; the CPU if not given.

    Raises:
        DataError: a prompt is empty, holds an unknown id, or leaves no room to go on.
    """
    _check(prompts, vocab_size, seq_length, max_new_tokens)
    sampling, device = sampling or Sampling(), device or torch.device("cpu")
    rows, longest = len(prompts), max(map(len, prompts)) + max_new_tokens
    # One length for all steps: stages tell each other a shape once.  Padding comes after the
    # tokens, which do not see it.
    padded = -(-longest // topology.tensor_size) * topology.tensor_size
    tokens = np.zeros((rows, padded), dtype=np.int64)
    lengths = np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = NextTokenLogits(
        topology=topology,
        rows=rows,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        device=device,
    )
    finished = np.zeros(rows, dtype=bool)
    for position in range(max_new_tokens):
        engine.evaluate(_batch(tokens, lengths - 1, device), 1, loss_fn=logits)
        found = logits.take()
        for row in np.flatnonzero(~finished).tolist():
            drawn = sampling.draw(found[row], row=row, position=position)
            finished[row] = drawn == stop_token
            if not finished[row]:
                tokens[row, lengths[row]] = drawn
                lengths[row] += 1
        if topology.data_size == 1 and finished.all():
            break
    return [tokens[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(prompts)]


def _batch(
    tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], device: torch.device
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor]]]:
    yield (
        torch.from_numpy(tokens.copy()).to(device),
        (torch.from_numpy(positions.copy()).to(device),),
    )


def _check(
    prompts: Sequence[Sequence[int]], vocab_size: int, seq_length: int, max_new_tokens: int
) -> None:
    if not prompts:
        raise DataError("no prompt: give at least one")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {number} is empty; give it at least one token")
        strangers = [token for token in prompt if not 0 <= token < vocab_size]
        if strangers:
            raise DataError(
                f"prompt {number} holds the token id {strangers[0]}, but there are {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        if len(prompt) + max_new_tokens > seq_length:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} are wanted, but "
                f"the model takes {seq_length} in all; shorten the prompt or max_new_tokens"
            )
