"""Starting a soft prompt: after the base model's weights are known, from the words of a text."""

from __future__ import annotations

import torch

from megatron.config import Config
from megatron.engine.engine import TrainEngine
from megatron.errors import ConfigError
from megatron.model.soft_prompt import embed_prompt, find_prompt
from megatron.tokenizer.build import build_tokenizer


def start_prompt(config: Config, engine: TrainEngine) -> None:
    """Set the prompt to the embedding of ``init_string``, where there is one; collective.

    Raises:
        ConfigError: the text has no tokens, or tokens that the model does not know.
    """
    settings = config.model.soft_prompt_tuning
    found = find_prompt(engine.module)
    if settings is None or found is None or not settings.init_string:
        return
    words, prompt = found
    embed_prompt(words, prompt, _ids(config, settings.init_string))
    engine.take_weights()


def load_around_prompt(config: Config, engine: TrainEngine, before: torch.Tensor | None) -> None:
    """Start the prompt anew if the weights that were loaded came without one; collective.

    Args:
        config: of the run.
        engine: with the loaded weights.
        before: the prompt as it was before loading, of :func:`prompt_values`.
    """
    after = prompt_values(engine)
    if before is not None and after is not None and torch.equal(before, after):
        start_prompt(config, engine)


def prompt_values(engine: TrainEngine) -> torch.Tensor | None:
    """Return a copy of the prompt; None where there is none."""
    found = find_prompt(engine.module)
    return None if found is None else found[1].weight.detach().clone()


def _ids(config: Config, text: str) -> list[int]:
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type is None:
        raise ConfigError(
            "soft_prompt_tuning.init_string is to be turned into tokens, and no tokenizer is "
            "named; set tokenizer_type and vocab_file, or leave init_string out"
        )
    ids = build_tokenizer(
        tokenizer.tokenizer_type, tokenizer.vocab_file, tokenizer.merge_file
    ).encode(text)
    if not ids:
        raise ConfigError("soft_prompt_tuning.init_string has no tokens; leave it out")
    size = config.model.vocab_size
    if size is not None and max(ids) >= size:
        raise ConfigError(
            f"soft_prompt_tuning.init_string has token {max(ids)}, but vocab_size is {size}; set "
            "the tokenizer that the data was made with"
        )
    return ids
