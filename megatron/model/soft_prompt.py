"""A learned prompt before the tokens, for a model that stays as it is.

Prompt tuning (Lester et al. 2021, section 2): n vectors stand before the embedded tokens, only
they are trained, and the loss knows the tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.kv_cache import KVCache
from megatron.model.spec import ModelSpec, SoftPrompt
from megatron.parallel.parameters import ParameterScope


class PromptEmbedding(nn.Module):
    """The vectors, ``weight`` ``[n_tokens, hidden]``, the same on every tensor rank."""

    def __init__(self, scope: ParameterScope, settings: SoftPrompt, *, hidden: int) -> None:
        """Make the prompt, drawn from U(−range, range) until it is given better values.

        Raises:
            ConfigError: the sequence is divided among tensor ranks.
        """
        super().__init__()
        if scope.topology.splits_sequence:
            raise ConfigError(
                "soft_prompt_tuning does not go with sequence_parallel: the prompt would have to "
                "be divided with the sequence; set sequence_parallel: false"
            )
        reach = settings.init_range

        def draw(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
            values = generator.random(shape, dtype=np.float32)
            return torch.from_numpy(values).mul_(2 * reach).sub_(reach)

        self.weight = scope.parameter("weight", (settings.n_tokens, hidden), draw)

    def forward(self, embedded: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Put the prompt before ``[B, S, hidden]``, once where earlier tokens are cached."""
        if cache is not None and not cache.begin_with(len(self.weight)):
            return embedded
        prompt = self.weight.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([prompt, embedded], dim=1)


def find_prompt(model: nn.Module) -> tuple[nn.Module, PromptEmbedding] | None:
    """Return the token embedding and the prompt beside it, or None where there is no prompt."""
    for module in model.modules():
        prompt = getattr(module, "soft_prompt", None)
        words = getattr(module, "word_embeddings", None)
        if isinstance(prompt, PromptEmbedding) and isinstance(words, nn.Module):
            return words, prompt
    return None


def freeze_all_but_prompt(model: nn.Module) -> None:
    """Let nothing of a model be trained but its prompt."""
    found = find_prompt(model)
    assert found is not None
    model.requires_grad_(False)
    found[1].requires_grad_(True)


@torch.no_grad()
def embed_prompt(words: nn.Module, prompt: PromptEmbedding, ids: Sequence[int]) -> None:
    """Set the prompt to the embeddings of token ids, repeated or cut to its length; collective.

    Args:
        words: the token embedding, whose parts tensor ranks hold.
        prompt: filled here.
        ids: at least one.
    """
    length = len(prompt.weight)
    wanted = [ids[place % len(ids)] for place in range(length)]
    device = prompt.weight.device
    prompt.weight.copy_(words(torch.tensor([wanted], device=device))[0])


def prompt_length(spec: ModelSpec) -> int:
    """Return how many vectors stand before the tokens."""
    return 0 if spec.soft_prompt_tuning is None else spec.soft_prompt_tuning.n_tokens
