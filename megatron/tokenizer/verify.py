"""Checking on varied text that two encoders are the same function."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron.tokenizer.bytelevel import ByteLevelBPE

Encode = Callable[[Sequence[str]], list[bytes]]
EncodeRaw = Callable[[Sequence[str], np.dtype[Any]], list[bytes]]

_HAND_MADE = (
    "", " ", "  ", "\n", "\r\n", "\t\t x", "a", " a", "a ", "a  b   c", "  leading", "trailing   ",
    "It's we'll they'RE I'm 'twas don't''s 's's 'S ' s 'd'd", "x = y+1;\n\n    return  x\n\t}\n ",
    "0 12 345 6789 1e-4 3.14 1,000 ½ ² ٣٤ Ⅷ 一二三", "snake_case CamelCase kebab-case __init__",
    "http://example.org/a?b=c&d=%20#e user@example.org", "!!! ... ??? -- --- <=> /* */ # $%^&*()",
    "ÀÉÎõü straße Ελληνικά кириллица עברית العربية हिन्दी ไทย 日本語 한국어 中文",
    "e\u0301 n\u0303 \u00e9 ﬁ Å",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 ☃ ♥️ 𝔘𝔫𝔦 𐍈", "\u00a0\u2003\u3000\u2028\u2029\u0085\u180e\u200b\ufeff",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x0b\x0c",
    "<|endoftext|>", "a<|endoftext|>b <|endoftext|> <|endoftext", "<|padding|><|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ſ K 'ſ İı Ǆ ǅ", "\ud7ff\ue000\uffff\U0010ffff",
)  # fmt: skip
_ALPHABETS = (
    (0x20, 0x7F), (0x20, 0x7F), (0x09, 0x0E), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE80),
    (0x2000, 0x2070), (0x2190, 0x2200), (0x3000, 0x3100), (0x4E00, 0x5200), (0xAC00, 0xAD00),
    (0xFB00, 0xFB20), (0xFF00, 0xFF70), (0x1D400, 0x1D500), (0x1F300, 0x1F680),
)  # fmt: skip


def probe_texts(parts: ByteLevelBPE, seed: int = 0) -> list[str]:
    """Return texts that exercise every kind of character, spacing and added token.

    About 60 kB, the same for the same tokenizer and seed.
    """
    rng = random.Random(seed)
    names = [token.content for token in parts.added]
    words = [_text(left + right) for left, right, _ in parts.merges]
    words = [word for word in words if word] or ["a"]
    texts = list(_HAND_MADE)
    texts += [f"a{name} {name}{name}b\n{name}" for name in names[:200]]
    for _ in range(60):
        texts.append("".join(rng.choice(words) for _ in range(40)))
        texts.append(_random_characters(rng, 120))
        texts.append("".join(rng.choice((" ", "\n", "\t", "'", "s", "ll", "1")) for _ in range(60)))
    for _ in range(20):
        mixed = [rng.choice(words), _random_characters(rng, 12), rng.choice(names or [" "])]
        texts.append("".join(rng.choice(mixed) for _ in range(20)))
    return texts


def first_difference(texts: Sequence[str], one: Encode, other: Encode) -> str | None:
    """Return the first text (shortened) that the two encode differently; None if there is none."""
    for text, a, b in zip(texts, one(texts), other(texts), strict=True):
        if a != b:
            return text if len(text) <= 60 else text[:57] + "..."
    return None


def _random_characters(rng: random.Random, count: int) -> str:
    out = []
    for _ in range(count):
        low, high = rng.choice(_ALPHABETS)
        out.append(chr(rng.randrange(low, high)))
    return "".join(out)


def _text(token: bytes) -> str:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return ""
