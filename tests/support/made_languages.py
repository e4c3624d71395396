"""Conversations in made-up languages that have the same words, and differ in how they use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.tokenizer.train import train_byte_level_bpe

_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki")
WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]
LANGUAGES = 5
VOCABULARY = 330
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def text(language: int, seed: int, words: int = 30) -> str:
    """Return text in which some words are frequent, and most have one that follows them."""
    own = np.random.default_rng(100 + language)
    order, follows = own.permutation(len(WORDS)), own.permutation(len(WORDS))
    chances = 1 / np.arange(4, 4 + len(WORDS))
    random = np.random.default_rng([language, seed])

    def drawn() -> int:
        return int(order[random.choice(len(WORDS), p=chances / chances.sum())])

    at, found = drawn(), []
    for _ in range(words):
        found.append(WORDS[at])
        at = int(follows[at]) if random.random() < 0.6 else drawn()
    return " ".join(found)


def chat(language: int, seed: int) -> dict[str, Any]:
    """Return a question of six words, and the answer that goes on with it."""
    words = text(language, seed).split()
    return {
        "messages": [
            {"role": "user", "content": " ".join(words[:6])},
            {"role": "assistant", "content": " ".join(words[6:])},
        ]
    }


def write_chats(file: Path, languages: list[int], first: int = 0) -> Path:
    """Write a conversation in each of the languages, numbered from ``first`` on."""
    lines = [json.dumps(chat(one, first + at)) for at, one in enumerate(languages)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_chat_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with a chat template; return its folder."""
    import transformers

    folder.mkdir(parents=True)
    texts = [text(language, seed, 60) for language in range(LANGUAGES) for seed in range(20)]
    train_byte_level_bpe(texts, folder / "bpe.json", vocab_size=VOCABULARY)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "bpe.json"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
