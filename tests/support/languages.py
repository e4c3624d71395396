"""Made-up languages with the same words in other orders, and models that learn them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support import local_tasks

WORDS = local_tasks.WORDS
KEPT = 0.8


def text(language: int, seed: int, words: int = 24) -> str:
    """Return text in which a word is mostly followed by the one that its language has for it."""
    follows = np.random.default_rng(100 + language).permutation(len(WORDS))
    random = np.random.default_rng([7, language, seed])
    word, found = int(random.integers(len(WORDS))), []
    for _ in range(words):
        found.append(WORDS[word])
        kept = random.random() < KEPT
        word = int(follows[word]) if kept else int(random.integers(len(WORDS)))
    return " ".join(found)


def train_model(folder: Path, texts: Sequence[str], *, steps: int) -> Path:
    """Train a tiny Llama from a seed, and write it with its tokenizer; return the folder."""
    folder.mkdir(parents=True)
    local_tasks.make_tokenizer(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = [torch.tensor(tokenizer(one)["input_ids"]) for one in texts]
    random = np.random.default_rng(5)
    for _ in range(steps):
        batch = [ids[n] for n in random.choice(len(ids), 16)]
        shortest = min(len(one) for one in batch)
        rows = torch.stack([one[:shortest] for one in batch])
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
