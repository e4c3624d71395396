"""How many characters a token stands for, from decoded held-out text."""

from __future__ import annotations

import numpy as np

from megatron.config import Config
from megatron.data.validation import ValidationSet
from megatron.training.domains import OpenDomains
from megatron.training.inference_options import run_tokenizer

_WINDOWS = 200


def tokens_per_character(config: Config, domains: OpenDomains, samples: int) -> dict[str, float]:
    """Return the tokens a character of each domain's held-out text, where that is asked for.

    Args:
        config: with ``char_level_ppl``.
        domains: opened data.
        samples: windows of a validation; as many are decoded, 200 at most.

    Raises:
        ConfigError: no tokenizer is named.
    """
    if not config.training.char_level_ppl or samples < 1:
        return {}
    tokenizer = run_tokenizer(config, "char_level_ppl")
    found = {}
    for name, domain in zip(domains.measured, domains.valid, strict=True):
        if domain is None or domain.num_windows(0) < 1:
            continue
        held_out = ValidationSet(domain, min(samples, _WINDOWS), seed=config.training.seed)
        rows = (np.asarray(batch.targets[0]) for batch in held_out.micro_batches(1, 0, 1))
        tokens = characters = 0
        for row in rows:
            tokens += row.size
            characters += len(tokenizer.decode_text(row.tolist()))
        if characters:
            found[name] = tokens / characters
    return found
