"""A checkpoint of ours as the language model that scores documents, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from megatron.checkpoint.store import CheckpointStore
from megatron.engine.runtime import Runtime
from megatron.model.accounting import forward_flops
from megatron.model.domain_loss import DomainLoss
from megatron.parallel.topology import Topology
from megatron.selection.base import Say
from megatron.selection.language_model import Ids, Losses, Named
from megatron.selection.padding import cut_rows, pad_rows
from megatron.tokenizer import Tokenizer
from megatron.training.frozen import build_frozen, whole_parameters
from megatron.training.inference_options import run_tokenizer
from megatron.training.reference_checkpoint import ReferenceCheckpoint, find_reference


def find_ours(model: Named, *, verified: bool, say: Say) -> ReferenceCheckpoint:
    """Return the checkpoint that ``--model`` names.

    Args:
        model: a run's folder, its folder of checkpoints or one checkpoint, and its step.
        verified: read and compare every byte; otherwise only the manifest is read.
        say: takes a line for the console.

    Raises:
        CheckpointError: there is none that is complete.
    """
    return find_reference(model.path, step=model.step, verified=verified, say=say, name="--model")


def convert_ours(found: ReferenceCheckpoint, cache: Path, say: Say) -> None:
    """Write the weights whole into a cache, unless they lie so beside the checkpoint.

    Raises:
        CheckpointError: they cannot be converted.
        ConfigError, DataError: there is no tokenizer, without which they are of no use here.
    """
    run_tokenizer(found.config, "scoring documents")
    whole_parameters(found, CheckpointStore(cache), say)


class OurModel:
    """A model of any architecture of ours; see :class:`LanguageModel`."""

    def __init__(
        self, found: ReferenceCheckpoint, *, cache: Path, dtype: str, device: torch.device, say: Say
    ) -> None:
        """Load the weights, whole, into this process.

        Args:
            found: the checkpoint.
            cache: folder of its weights in the universal format, see :func:`convert_ours`.
            dtype: ``fp32``, ``bf16`` or ``fp16``.
            device: where it runs.
            say: takes a line for the console.

        Raises:
            CheckpointError: the weights cannot be read.
            ConfigError: the run's configuration names no tokenizer.
        """
        spec = found.config.model
        assert spec.vocab_size is not None
        self._spec, self._device = spec, device
        self._tokenizer: Tokenizer = run_tokenizer(found.config, "scoring documents")
        self.longest: int | None = spec.max_position_embeddings or spec.context_length
        self.vocab_size: int = spec.vocab_size
        self.tokenizer: str | None = self._tokenizer.sha256
        topology = Topology.single()
        self._loss = DomainLoss(topology=topology, vocab_size=spec.vocab_size)
        runtime = Runtime(rank=0, world_size=1, local_rank=0, device=device, host_group=None)
        self._model = build_frozen(
            found,
            whole_parameters(found, CheckpointStore(cache), say),
            found.config.model_copy(update={"precision": dtype}),
            runtime,
            topology,
            micro=1,
            accumulation=1,
        )
        self._flops = lru_cache(maxsize=None)(self._count)

    @property
    def first_token(self) -> int:
        """See :class:`LanguageModel`: the tokenizer's own, or else what ends a document."""
        return self._tokenizer.bos

    def encode(self, text: str) -> list[int]:
        """See :class:`LanguageModel`."""
        return self._tokenizer.encode(text)

    def token_losses(self, rows: Sequence[Ids]) -> list[Losses]:
        """See :class:`LanguageModel`."""
        padded = pad_rows(rows).to(self._device)
        kept: list[torch.Tensor] = []

        def keep(output: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
            # What is beyond the second balances experts in training.
            losses = self._loss.token_losses(output[0], output[1], labels)
            kept.append(losses)
            return losses.new_zeros(())

        batch = padded[:, :-1].contiguous(), padded[:, 1:].contiguous()
        self._model.evaluate([batch], 1, loss_fn=keep)
        return cut_rows(kept[0], rows)

    def forward_flops(self, length: int) -> float:
        """See :class:`LanguageModel`: the formula of training's, forward alone."""
        return self._flops(length)

    def _count(self, length: int) -> float:
        spec = self._spec.model_copy(update={"seq_length": length})
        return forward_flops(spec, length)
