"""A folder of transformers as the language model that scores documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron.errors import DataError
from megatron.selection.devices import DTYPES
from megatron.selection.language_model import Ids, Losses
from megatron.selection.model_folder import (
    attention_width,
    causal_flops,
    forward_matrices,
    load_causal,
    load_tokenizer,
    longest_input,
    tokenizer_identity,
)
from megatron.selection.padding import cut_rows, pad_rows

_PURPOSE = "scoring by a model of transformers"
_CHUNK_TOKENS = 1024


class TransformersModel:
    """A causal language model that transformers knows; see :class:`LanguageModel`."""

    def __init__(self, folder: Path, *, dtype: str, device: torch.device) -> None:
        """Load model and tokenizer.

        Args:
            folder: as ``save_pretrained`` writes it; nothing is fetched from anywhere.
            dtype: ``fp32``, ``bf16`` or ``fp16``.
            device: where it runs.

        Raises:
            CheckpointError: transformers does not load the model.
            DataError: there is no tokenizer.
        """
        self.tokenizer = tokenizer_identity(folder)
        self._folder, self._device = folder, device
        self._encode = load_tokenizer(folder, _PURPOSE)
        model = load_causal(folder, _PURPOSE, DTYPES[dtype])
        self._matrices, self._width = forward_matrices(model), attention_width(model.config)
        self._model = model.to(device)
        self.longest = longest_input(model.config)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)

    @property
    def first_token(self) -> int:
        """See :class:`LanguageModel`: what begins a text, or else what ends one."""
        for token in (self._encode.bos_token_id, self._encode.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError(
            f"--bos: the tokenizer in {self._folder} has neither a first nor a last token; leave "
            "the flag out"
        )

    def encode(self, text: str) -> list[int]:
        """See :class:`LanguageModel`."""
        # A text longer than the model reads is cut into windows here, not by the tokenizer.
        ids = self._encode(text, truncation=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def token_losses(self, rows: Sequence[Ids]) -> list[Losses]:
        """See :class:`LanguageModel`."""
        padded = pad_rows(rows).to(self._device)
        tokens, targets = padded[:, :-1].contiguous(), padded[:, 1:].flatten()
        with torch.no_grad():
            logits = self._model(tokens, use_cache=False).logits.flatten(0, 1)
            losses = torch.empty(len(targets), dtype=torch.float32, device=self._device)
            for first in range(0, len(targets), _CHUNK_TOKENS):
                part = slice(first, first + _CHUNK_TOKENS)
                losses[part] = torch.nn.functional.cross_entropy(
                    logits[part].float(), targets[part], reduction="none"
                )
        return cut_rows(losses.view_as(tokens), rows)

    def forward_flops(self, length: int) -> float:
        """See :class:`LanguageModel`."""
        return causal_flops(self._matrices, self._width, length)
