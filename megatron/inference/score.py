"""How probable given continuations are, with a model that may be divided among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megatron.errors import DataError
from megatron.inference.model import InferenceModel
from megatron.parallel.collectives import broadcast_from_last_stage, gather_last_dimension
from megatron.parallel.sequence import enter_shared
from megatron.parallel.topology import Topology

_CHUNK_TOKENS = 256
_Micro = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class Request(NamedTuple):
    """A context and what follows it, as token ids; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding gives it."""

    log_probability: float
    greedy: bool


class ContinuationScores:
    """Stands in for the loss function and keeps two numbers for every row.

    A row's first number is the sum of the log-probabilities of its marked targets; the second
    counts those that are not the most probable token (the first of equals).
    """

    def __init__(self, *, topology: Topology, vocab_size: int) -> None:
        """Begin empty.

        Args:
            topology: this rank's place.
            vocab_size: token ids, without padding, which has no probability.
        """
        self._topology = topology
        self._vocab_size = vocab_size
        self._kept: list[torch.Tensor] = []

    def __call__(self, output: Any, labels: Any) -> torch.Tensor:
        """Keep a micro-batch's sums; ``labels`` are targets and marks, ``[B, S]`` each."""
        part, weight = output
        hidden = enter_shared(part, self._topology)
        targets, marked = labels
        sums = torch.zeros(len(targets), 2, dtype=torch.float64, device=hidden.device)
        rows, places = marked.nonzero(as_tuple=True)
        for first in range(0, len(rows), _CHUNK_TOKENS):
            row, place = (part[first : first + _CHUNK_TOKENS] for part in (rows, places))
            own = hidden[row, place] @ weight.T
            logits = gather_last_dimension(own, self._topology)[:, : self._vocab_size].float()
            target = targets[row, place]
            found = logits.log_softmax(dim=-1).gather(1, target[:, None]).squeeze(1)
            missed = logits.argmax(dim=-1) != target
            sums.index_add_(0, row, torch.stack([found.double(), missed.double()], dim=1))
        self._kept.append(sums)
        return sums.new_zeros((), dtype=torch.float32)

    def take(self, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Return what was kept of ``shape`` (micro-batches, rows) on every stage; collective."""
        count, rows = shape
        sums = torch.zeros(count, rows, 2, dtype=torch.float64, device=device)
        if self._kept:
            sums.copy_(torch.stack(self._kept))
        self._kept = []
        broadcast_from_last_stage(sums, self._topology)
        return sums.cpu()


def share(count: int, rows: int, ranks: int) -> list[list[int]]:
    """Deal numbers from 0 to ``count`` to data ranks, batch by batch.

    Returns:
        The numbers of each rank; every rank has the same number of batches of ``rows``, the
        last of which may be short or empty.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for batch, first in enumerate(range(0, count, rows)):
        dealt[batch % ranks] += range(first, min(first + rows, count))
    return dealt


def score(model: InferenceModel, requests: Sequence[Request]) -> dict[int, Score]:
    """Score this data rank's share of the requests; collective, all ranks give the same ones.

    A context that is too long loses its beginning.

    Returns:
        Scores by number of the request.

    Raises:
        DataError: a request is empty, too long or holds an unknown id.
    """
    for number, request in enumerate(requests):
        _check(model, number, request)
    # Long ones first: neighbours need little padding, and what does not fit fails at once.
    order = sorted(range(len(requests)), key=lambda n: -_length(requests[n], model.longest))
    ranks, rows = model.topology.data_size, model.rows
    dealt = share(len(order), rows, ranks)[model.topology.data_rank]
    batches = -(-len(order) // (rows * ranks))
    # Micro-batches of a pass have one shape; several keep a pipeline's stages busy.
    together = 2 * model.topology.pipe_size if model.topology.pipe_size > 1 else 1
    found: dict[int, Score] = {}
    for first in range(0, batches, together):
        count = min(together, batches - first)
        numbers = dealt[first * rows : (first + count) * rows]
        places = [order[n] for n in numbers]
        found.update(_pass(model, requests, places, count))
    return found


def _pass(
    model: InferenceModel, requests: Sequence[Request], numbers: Sequence[int], count: int
) -> Iterator[tuple[int, Score]]:
    rows = model.rows
    longest = max((_length(requests[n], model.longest) for n in numbers), default=1)
    shape = (count * rows, model.padded(longest))
    tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    marked = torch.zeros(shape, dtype=torch.bool)
    for row, number in enumerate(numbers):
        context, continuation = requests[number]
        whole = torch.tensor([*context, *continuation][-(model.longest + 1) :])
        length = len(whole) - 1
        tokens[row, :length], targets[row, :length] = whole[:-1], whole[1:]
        marked[row, length - len(continuation) : length] = True
    scores = ContinuationScores(topology=model.topology, vocab_size=model.vocab_size)
    batches = _micro_batches((tokens, targets, marked), rows, model.device)
    model.model.evaluate(batches, count, loss_fn=scores)
    sums = scores.take((count, rows), model.device).flatten(0, 1).tolist()
    for number, (log_probability, missed) in zip(numbers, sums, strict=False):
        yield number, Score(log_probability, missed == 0)


def _micro_batches(
    whole: tuple[torch.Tensor, ...], rows: int, device: torch.device
) -> Iterator[_Micro]:
    for first in range(0, len(whole[0]), rows):
        tokens, targets, marked = (part[first : first + rows].to(device) for part in whole)
        yield tokens, (targets, marked)


def _length(request: Request, longest: int) -> int:
    """Return how many tokens the model is given."""
    return min(len(request.context) + len(request.continuation) - 1, longest)


def _check(model: InferenceModel, number: int, request: Request) -> None:
    context, continuation = request
    if not context or not continuation:
        raise DataError(f"request {number} has an empty context or continuation")
    if len(continuation) > model.longest:
        raise DataError(
            f"request {number} asks for the probability of {len(continuation)} tokens at once, "
            f"and the model takes {model.longest}"
        )
    model.check_ids(context, f"the context of request {number}")
    model.check_ids(continuation, f"the continuation of request {number}")
