"""One data-parallel rank's micro-batches, read and put together ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.data.batch import MicroBatch, make_micro_batch, sample_weights
from megatron.data.domain import Domain
from megatron.data.permutation import permute
from megatron.data.plan import Plan
from megatron.data.sampler import Sampler
from megatron.data.samples import Place, Samples, check_samples, read_samples
from megatron.errors import RunError

T = TypeVar("T")

# Micro-batches put together before they are asked for: enough to hide a slow read, few enough
# that a step of many large micro-batches does not lie in memory whole.
_AHEAD = 4


class Loader:
    """Turns plans into the micro-batches of one data-parallel rank.

    A background thread reads and assembles, so that of a step only the first micro-batch is
    waited for; the kernel is told of all windows of the step before the first is read.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        *,
        seq_length: int,
        micro_batch: int,
        accumulation: int,
        data_rank: int,
        data_size: int,
        eod_mask_loss: bool = False,
        eod_id: int | None = None,
        reduce_counts: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
        vocab_size: int | None = None,
        pin_memory: bool = False,
        prefetch: bool = True,
        node_rank: int | None = None,
        node_size: int | None = None,
        lengths: Callable[[int], int] | None = None,
    ) -> None:
        """Make a loader; no file is read yet.

        Args:
            domains: K domains, in the order of the plan's indices.
            seq_length: S.
            micro_batch: B, rows per micro-batch of this rank.
            accumulation: micro-batches per step.
            data_rank: of this process among the data-parallel ranks.
            data_size: number of them.
            eod_mask_loss: mask the loss where ``eod_id`` is the input.
            eod_id: the end-of-document token.
            reduce_counts: sums an int64 [K] over data-parallel ranks, called by the thread that
                iterates, once a step; needed for ``eod_mask_loss`` with several ranks.
            vocab_size: ids at or above it raise DataError.
            pin_memory: give pinned torch tensors (needs CUDA) instead of NumPy arrays.
            prefetch: assemble in a background thread.
            node_rank: of this process among the data-parallel ranks that share this machine's
                page cache; they divide :meth:`prefetch_for` among them.  Default: all share.
            node_size: number of those.
            lengths: inputs of a step's rows, by the number of the step, at most S; what is behind
                them is left out.  None = S.

        Raises:
            RunError: ``pin_memory`` without CUDA.
        """
        if any(domain.seq_length != seq_length for domain in domains):
            raise ValueError(f"a domain is cut for another seq_length than {seq_length}")
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} of {data_size}")
        if eod_mask_loss and eod_id is None:
            raise ValueError("eod_mask_loss needs eod_id")
        #: Whether the tokens that the loss counts must be seen to be counted.
        self.counts_tokens = eod_mask_loss or any(domain.masks for domain in domains)
        if self.counts_tokens and data_size > 1 and reduce_counts is None:
            raise ValueError("a loss mask with several data-parallel ranks needs reduce_counts")
        if pin_memory:
            _check_cuda()
        self.domains, self.seq_length = tuple(domains), seq_length
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.data_rank, self.data_size = data_rank, data_size
        self._masked_token = eod_id if eod_mask_loss else None
        self._reduce_counts = reduce_counts
        self._vocab_size, self._pin_memory = vocab_size, pin_memory
        self._node_rank = data_rank if node_rank is None else node_rank
        self._node_size = data_size if node_size is None else node_size
        self._lengths = lengths
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader") if prefetch else None

    def load(self, plan: Plan, loss_weights: ArrayLike | None = None) -> Iterator[MicroBatch]:
        """Return an iterator over this rank's micro-batches; reading begins at once.

        Args:
            plan: of the step.
            loss_weights: [K] weight of each token of a domain; ``None`` = 1.

        Raises:
            DataError: on iteration, if a file cannot be read or holds foreign ids.
        """
        slots = plan.slots(self.micro_batch, self.accumulation, self.data_rank, self.data_size)
        weights = None if loss_weights is None else np.asarray(loss_weights, dtype=np.float64)
        step = _Step(loader=self, plan=plan, slots=slots, loss_weights=weights)
        return step.masked() if self.counts_tokens else step.unmasked()

    def prefetch_for(self, sampler: Sampler, weights: ArrayLike, steps: int = 1) -> None:
        """Tell the kernel of the windows that the next steps will want, should ``weights`` hold.

        The order within a domain is known ahead, how many are drawn of each only roughly; so
        each domain's next windows are announced, divided among the ranks of this machine.
        The background thread does it, where there is one.
        """
        upcoming = sampler.upcoming(weights, steps * sampler.global_batch)
        domain, epoch, sample = (part[self._node_rank :: self._node_size] for part in upcoming)
        if self._pool is None:
            self._announce(domain, epoch, sample)
        else:
            self._pool.submit(self._announce, domain, epoch, sample)

    def close(self) -> None:
        """Stop the background thread; micro-batches not yet taken are given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """Start a call in the background, or put it off until its result is asked for."""
        if self._pool is None:
            return cache(lambda: function(*arguments))
        future: Future[T] = self._pool.submit(function, *arguments)
        return future.result

    def _announce(
        self, domain: NDArray[Any], epoch: NDArray[np.int64], sample: NDArray[np.int64]
    ) -> list[Place]:
        places = locate(self.domains, domain, epoch, sample)
        for place in places:
            place.announce()
        return places

    def _length(self, step: int) -> int:
        """Return the inputs of a step's rows."""
        return self.seq_length if self._lengths is None else self._lengths(step)

    def _read(self, places: Sequence[Place], domain: NDArray[Any], length: int) -> Samples:
        samples = read_samples(places, self.seq_length)
        names = [self.domains[place].name for place in domain.tolist()]
        check_samples(samples, names, self._vocab_size)
        return samples if length == self.seq_length else samples.cut(length)

    def _assemble(
        self,
        samples: Samples,
        domain: NDArray[Any],
        weight: NDArray[np.float64],
    ) -> MicroBatch:
        return make_micro_batch(
            samples.tokens,
            labels=samples.labels,
            seq_length=samples.tokens.shape[1] - 1,
            domain_ids=domain.astype(np.int64),
            sample_weight=weight,
            masked_token=self._masked_token,
            pin_memory=self._pin_memory,
        )


class _Step:
    """One step's work for a loader."""

    def __init__(
        self,
        *,
        loader: Loader,
        plan: Plan,
        slots: NDArray[np.int64],
        loss_weights: NDArray[np.float64] | None,
    ) -> None:
        self._loader, self._plan, self._loss_weights = loader, plan, loss_weights
        self._length = loader._length(plan.step)
        self._domain: NDArray[Any] = plan.domain[slots]
        flat = slots.reshape(-1)
        self._places = loader._run(
            loader._announce, plan.domain[flat], plan.epoch[flat], plan.sample[flat]
        )

    def unmasked(self) -> Iterator[MicroBatch]:
        """Every token counts: the denominator is known from the plan."""
        weight = self._weights(self._plan.counts() * self._length)

        def job(micro: int) -> MicroBatch:
            return self._loader._assemble(self._windows(micro), self._domain[micro], weight[micro])

        return self._ahead(job)

    def masked(self) -> Iterator[MicroBatch]:
        """Tokens must be seen to be counted, so rows are weighted after the whole step is read.

        Until then its windows are kept in the narrow type of the files.
        """
        counted = self._loader._run(self._count)

        def micro_batches() -> Iterator[MicroBatch]:
            windows, counts = counted()
            if self._loader._reduce_counts is not None:
                counts = self._loader._reduce_counts(counts)
            weight = self._weights(np.asarray(counts))

            def job(micro: int) -> MicroBatch:
                return self._loader._assemble(windows[micro], self._domain[micro], weight[micro])

            yield from self._ahead(job)

        return micro_batches()

    def _count(self) -> tuple[list[Samples], NDArray[np.int64]]:
        counts = np.zeros(len(self._loader.domains), dtype=np.int64)
        windows = [self._windows(micro) for micro in range(self._loader.accumulation)]
        for rows, domain in zip(windows, self._domain, strict=True):
            np.add.at(counts, domain, rows.counted(self._loader._masked_token))
        return windows, counts

    def _windows(self, micro: int) -> Samples:
        rows = self._loader.micro_batch
        places = self._places()[micro * rows : (micro + 1) * rows]
        return self._loader._read(places, self._domain[micro], self._length)

    def _weights(self, domain_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        parts = self._loader.accumulation * self._loader.data_size
        return sample_weights(self._domain, self._loss_weights, domain_tokens, parts)

    def _ahead(self, job: Callable[[int], MicroBatch]) -> Iterator[MicroBatch]:
        """Start the first jobs now, and each further one when one is taken."""
        total = self._loader.accumulation
        running = deque(self._loader._run(job, micro) for micro in range(min(_AHEAD, total)))

        def micro_batches() -> Iterator[MicroBatch]:
            for micro in range(total):
                result = running.popleft()()
                if micro + _AHEAD < total:
                    running.append(self._loader._run(job, micro + _AHEAD))
                yield result

        return micro_batches()


def locate(
    domains: Sequence[Domain],
    domain: NDArray[Any],
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
) -> list[Place]:
    """Find many samples at once.

    Args:
        domains: K domains.
        domain: [n] indices into ``domains``.
        epoch: [n] epochs.
        sample: [n] positions in the epochs' orders.

    Returns:
        Where each of them lies.
    """
    keys = list(zip(domain.tolist(), epoch.tolist(), strict=True))
    epochs = {key: domains[key[0]].epoch(key[1]) for key in set(keys)}
    size = np.array([epochs[key].windows.count for key in keys], dtype=np.int64)
    shuffle = np.array([epochs[key].key for key in keys], dtype=np.uint64)
    windows = permute(sample, size, shuffle).tolist()
    places: list[Place] = []
    for key, window, number in zip(keys, windows, sample.tolist(), strict=True):
        places.append(domains[key[0]].place(key[1], window, number))
    return places


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RunError("pin_memory: pinned host memory needs a CUDA device, there is none")
