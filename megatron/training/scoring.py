"""``tools/score_data.py``: run a model over the training windows of a run, and keep its losses.

Windows are scored in the order of the stream, a block at a time.  Each data rank writes its part
of the block; when all of it is on the disk, rank 0 says so in the store's header.  So the work
can end anywhere and be taken up in any layout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.checkpoint.files import remove_tree
from megatron.config import Config, resolve_batch
from megatron.data.batch import check_token_ids, read_windows
from megatron.data.domain import Domain
from megatron.data.loss_header import StoreHeader, describe_domain, header_of
from megatron.data.loss_store import stream_starts
from megatron.data.loss_writing import BlockWriter, mark_scored, prepare_store
from megatron.engine.frozen import FrozenModel
from megatron.engine.runtime import Runtime
from megatron.errors import ConfigError, NeomixError, RunError, did_you_mean
from megatron.launch.stop import StopFlag
from megatron.model.accounting import parameter_count
from megatron.model.domain_loss import DomainLoss
from megatron.monitor.throughput import short
from megatron.parallel.topology import Topology
from megatron.signals.reference import TokenLosses
from megatron.training.domains import OpenDomains, start_weights
from megatron.training.frozen import (
    build_frozen,
    describe_frozen,
    share_reference,
    share_weights,
)
from megatron.training.layout import frozen_layout
from megatron.training.reference_checkpoint import ReferenceCheckpoint
from megatron.training.reference_options import epochs_read, splits_of

CACHE_NAME = "model"
_TELL_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What shall be scored.

    Attributes:
        checkpoint: a run's folder, its folder of checkpoints, or one checkpoint.
        out: folder of the store.
        step: of the checkpoint; None takes the newest.
        epochs: passes over every domain; None takes as many as the run would begin if it kept
            to its start weights.
        domains: names; empty for all.
        block: micro-batches of a rank between two notes of progress.
    """

    checkpoint: str
    out: str
    step: int | None = None
    epochs: int | None = None
    domains: tuple[str, ...] = ()
    block: int = 64


def score(
    config: Config,
    domains: OpenDomains,
    runtime: Runtime,
    stop: StopFlag,
    request: ScoreRequest,
    say: Callable[[str], None],
) -> int:
    """Score what is asked for and not there yet; collective.

    Args:
        config: of the run whose data it is, with ``model.vocab_size`` filled in; its model is
            not used.
        domains: of that run.
        runtime: ranks and device.
        stop: ends the work after a block.
        request: what to score.
        say: takes a line for the console, on rank 0.

    Returns:
        The exit code: 0 when the store is complete, else the stop flag's.

    Raises:
        NeomixError: the checkpoint, the data or the store does not fit, or the disk refuses.
    """
    chosen = _chosen(domains, request.domains)
    for domain in chosen:
        domain.stream_windows(0)
    topology = Topology.create(
        frozen_layout(config, runtime.world_size),
        runtime.rank,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    folder = Path(request.out)
    reference = share_reference(request.checkpoint, config, runtime, step=request.step, say=say)
    facts = _facts(config, domains, chosen, reference, request, runtime.world_size)
    header = _prepare(folder, facts, runtime)
    if all(header.domains[domain.name].complete for domain in chosen):
        say(_how_to_use(folder))
        return 0
    scorer = _scorer(config, runtime, topology, reference, header, request, stop, say)
    if not scorer.run(chosen):
        say(f"stopped; run the command again to go on, {folder} keeps what is scored")
        return stop.exit_code
    if runtime.rank == 0:
        # Whole parameters with their moments, which nobody needs any more.
        remove_tree(folder / CACHE_NAME)
    say(_how_to_use(folder))
    return 0


def _scorer(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    reference: ReferenceCheckpoint,
    header: StoreHeader,
    request: ScoreRequest,
    stop: StopFlag,
    say: Callable[[str], None],
) -> _Scorer:
    """Build the model and what runs it; collective."""
    folder = Path(request.out)
    say(describe_frozen(reference, config, topology))
    files = share_weights(reference, runtime, cache=folder / CACHE_NAME, say=say)
    micro, accumulation, _ = resolve_batch(config.batch, topology.data_size)
    model = build_frozen(
        reference, files, config, runtime, topology, micro=micro, accumulation=accumulation
    )
    assert config.model.vocab_size is not None
    return _Scorer(
        folder=folder,
        header=header,
        model=model,
        loss=DomainLoss(topology=topology, vocab_size=config.model.vocab_size),
        runtime=runtime,
        topology=topology,
        micro=micro,
        block=request.block,
        stop=stop,
        say=say,
    )


def _how_to_use(folder: Path) -> str:
    return f"{folder} is complete: use it with mixing: {{reference_losses: {folder}}}"


def _chosen(domains: OpenDomains, names: tuple[str, ...]) -> list[Domain]:
    for name in names:
        if name not in domains.names:
            raise ConfigError(
                f"--domains: there is no domain '{name}'{did_you_mean(name, domains.names)}"
            )
    return [domain for domain in domains.train if not names or domain.name in names]


def _facts(
    config: Config,
    domains: OpenDomains,
    chosen: list[Domain],
    reference: ReferenceCheckpoint,
    request: ScoreRequest,
    world_size: int,
) -> StoreHeader:
    if request.epochs is not None:
        epochs = dict.fromkeys(domains.names, request.epochs)
    else:
        weights = start_weights(config.mixing, config.domains, domains)
        epochs = epochs_read(config, domains, weights, world_size=world_size)
    splits = splits_of(config, domains)
    assert config.model.vocab_size is not None
    return StoreHeader(
        seq_length=config.model.context_length,
        epoch_offset=config.training.epoch_offset,
        seed=config.training.seed if config.training.epoch_offset else None,
        vocab_size=config.model.vocab_size,
        precision=config.precision,
        model_hash=reference.identity,
        model={
            "checkpoint": str(reference.path),
            "step": reference.manifest.step,
            "parameters": parameter_count(reference.config.model),
        },
        domains={
            domain.name: describe_domain(
                domain, split=splits[domain.name], epochs=epochs[domain.name]
            )
            for domain in chosen
        },
    )


def _prepare(folder: Path, facts: StoreHeader, runtime: Runtime) -> StoreHeader:
    """Make or take up the store on rank 0, and tell every rank what is in it."""
    answer: dict[str, Any] = {}
    if runtime.rank == 0:
        try:
            answer = {"header": asdict(prepare_store(folder, facts))}
        except NeomixError as error:
            answer = {"problem": str(error)}
    answer = runtime.broadcast(answer)
    if "problem" in answer:
        raise RunError(answer["problem"])
    return header_of(answer["header"])


class _Scorer:
    """Goes through windows block by block; see :func:`score`."""

    def __init__(
        self,
        *,
        folder: Path,
        header: StoreHeader,
        model: FrozenModel,
        loss: DomainLoss,
        runtime: Runtime,
        topology: Topology,
        micro: int,
        block: int,
        stop: StopFlag,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._header = folder, header
        self._model, self._recorder = model, TokenLosses(loss)
        self._runtime, self._topology = runtime, topology
        self._vocab_size = loss.vocab_size
        self._micro, self._block = micro, block
        self._stop, self._say = stop, say
        self._writes = topology.is_last_stage and topology.tensor_rank == 0
        self._begun = self._told = time.monotonic()
        self._tokens = 0

    def run(self, domains: list[Domain]) -> bool:
        """Score all that is not; return whether it came to the end."""
        with BlockWriter(self._folder, self._header.domains) as writer:
            return all(
                self._array(writer, domain, array)
                for domain in domains
                for array in range(len(self._header.domains[domain.name].windows))
            )

    def _array(self, writer: BlockWriter, domain: Domain, array: int) -> bool:
        name, ranks = domain.name, self._topology.data_size
        scores = self._header.domains[name]
        done, total = scores.scored[array], scores.windows[array]
        while done < total:
            # An even share of the block for every rank; what is over the end is not kept.
            count = min(self._block, -(-(total - done) // (ranks * self._micro)))
            share = count * self._micro
            self._score(writer, domain, array, done + self._topology.data_rank * share, count)
            begun, done = done, min(done + ranks * share, total)
            writer.sync()
            # Everybody has written when everybody has answered.
            stopped = any(self._runtime.gather(self._stop.requested))
            self._note(name, array, begun, done)
            if stopped:
                return False
        return True

    def _score(
        self, writer: BlockWriter, domain: Domain, array: int, first: int, count: int
    ) -> None:
        """Score ``count`` micro-batches from window ``first`` on, those that there are."""
        windows = domain.stream_windows(array)
        numbers = np.arange(first, first + count * self._micro, dtype=np.int64)
        kept = min(max(windows.count - first, 0), numbers.size)
        batches = self._batches(domain, array, np.minimum(numbers, windows.count - 1))
        self._model.evaluate(batches, count, loss_fn=self._recorder)
        losses = self._recorder.take()
        if self._writes and kept:
            values = torch.cat(losses)[:kept].cpu().numpy()
            starts = stream_starts(domain, windows, numbers[:kept])
            writer.write(domain.name, array, starts, values)

    def _batches(
        self, domain: Domain, array: int, numbers: NDArray[np.int64]
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor]]]:
        places = [domain.window_at(array, number) for number in numbers.tolist()]
        for reader, start in places:
            reader.will_need(start, start + domain.seq_length + 1)
        names = [domain.name] * self._micro
        for row in range(0, len(places), self._micro):
            tokens = read_windows(places[row : row + self._micro], domain.seq_length)
            check_token_ids(tokens, names, self._vocab_size)
            read = torch.from_numpy(tokens.astype(np.int64)).to(self._runtime.device)
            yield read[:, :-1].contiguous(), (read[:, 1:].contiguous(),)

    def _note(self, name: str, array: int, begun: int, done: int) -> None:
        if self._runtime.rank == 0:
            self._header = mark_scored(self._folder, self._header, name, array, done)
        scores, now = self._header.domains[name], time.monotonic()
        self._tokens += (done - begun) * self._header.seq_length
        if now - self._told >= _TELL_SECONDS or done == scores.windows[array]:
            self._told = now
            rate = self._tokens / max(now - self._begun, 1e-9)
            epochs = len(scores.windows)
            epoch = f" (epoch {array + 1} of {epochs})" if epochs > 1 else ""
            self._say(
                f"{name}{epoch}: {done:,} of {scores.windows[array]:,} windows, "
                f"{short(rate)} tokens/s"
            )
