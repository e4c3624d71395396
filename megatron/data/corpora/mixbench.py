"""MixBench's data: groups of two, three and seven domains, made on this machine.

Some families have room above even sampling: a domain that nothing can be learnt from, or that
is soon learnt.  Others have none, and show whether a method does harm.  A family can be drawn
again (other languages, another half of the real text), so that what was tuned on one draw is
tested on another.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from megatron.data.corpora import library, unicode_names
from megatron.data.corpora.documents import (
    SPLITS,
    Document,
    RepeatFilter,
    split_documents,
    take_bytes,
)
from megatron.data.corpora.languages import Cycle, Language, Lexicon, Markov, Tokens
from megatron.data.writer import TokenWriter
from megatron.errors import DataError, did_you_mean

Say = Callable[[str], None]
Make = Callable[[int], Language]
NAME = "mixbench"
CONFIG = "domains.yml"
FACTS = "family.json"
VERSION = 1
VOCABULARY = 128
DRAWS = (0, 1)
_DOCUMENT = 1024
_DOCUMENTS = {"train": 1000, "valid": 64, "test": 64}
_TEXT_BYTES = 2_400_000
_LEAST_HELD_OUT = 64_000

GENERATED: Mapping[str, Make] = {
    "noise": lambda seed: Markov(order=0, symbols=64, concentration=50.0, seed=seed),
    "easy": lambda seed: Markov(order=1, symbols=16, concentration=0.1, seed=seed),
    "middle": lambda seed: Markov(order=1, symbols=48, concentration=0.5, seed=seed),
    "rich": lambda seed: Markov(order=2, symbols=24, concentration=0.05, seed=seed),
    "words30": lambda seed: Lexicon(words=30, replaced=0.0, seed=seed),
    "words100": lambda seed: Lexicon(words=100, replaced=0.0, seed=seed),
    "words300": lambda seed: Lexicon(words=300, replaced=0.0, seed=seed),
    "words1000": lambda seed: Lexicon(words=1000, replaced=0.0, seed=seed),
    "words3000": lambda seed: Lexicon(words=3000, replaced=0.0, seed=seed),
    "mixed60": lambda seed: Lexicon(words=60, replaced=0.3, seed=seed),
    "mixed600": lambda seed: Lexicon(words=600, replaced=0.3, seed=seed),
    "mixed600b": lambda seed: Lexicon(words=600, replaced=0.3, seed=seed + 1),
    "hex": lambda seed: Markov(order=0, symbols=16, concentration=1e9, seed=seed),
    "cycle": lambda seed: Cycle(symbols=48, seed=seed),
}
"""Languages by name, each from a seed."""

TEXTS: Mapping[str, Callable[[], Iterator[Document]]] = {
    "code": library.code,
    "docstrings": library.docstrings,
    "manual": library.manual,
    "bytecode": library.bytecode,
    "unicode": unicode_names.characters,
}
"""Real text of the Python installation, by name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A group of domains.

    Attributes:
        domains: names, from :data:`GENERATED` and :data:`TEXTS`.
        room: whether a mixture other than even sampling is known to be better.
    """

    domains: tuple[str, ...]
    room: bool


FAMILIES: Mapping[str, Family] = {
    "m2": Family(domains=("noise", "rich"), room=True),
    "l2": Family(domains=("words30", "words3000"), room=False),
    "m3": Family(domains=("noise", "rich", "easy"), room=True),
    "r3": Family(domains=("code", "unicode", "hex"), room=True),
    "l3": Family(domains=("words30", "words300", "words3000"), room=False),
    "t3": Family(domains=("code", "docstrings", "manual"), room=False),
    "m7": Family(
        domains=("easy", "noise", "middle", "rich", "mixed60", "mixed600", "mixed600b"),
        room=True,
    ),
    "r7": Family(
        domains=("code", "docstrings", "manual", "bytecode", "unicode", "hex", "cycle"),
        room=True,
    ),
    "l7": Family(
        domains=("words30", "words100", "words300", "words1000", "words3000", "code", "manual"),
        room=False,
    ),
}
"""The families by name: m and r have room (generated, real text), l and t should have none."""


def prepare(
    root: Path,
    families: Sequence[str] = tuple(FAMILIES),
    draws: Sequence[int] = DRAWS,
    *,
    say: Say = print,
) -> None:
    """Make families under ``root``; what is there already stays.

    Each lies in ``root/FAMILY-DRAW``: token files, ``domains.yml`` (a configuration file that
    names them) and ``family.json`` (facts: the entropies that are known, whether there is room).

    Args:
        root: folder of the families.
        families: names from :data:`FAMILIES`.
        draws: which languages, or which half of the real text, from 0 on.
        say: receives one line per family.

    Raises:
        DataError: an unknown family, a draw below 0, or this Python lacks a source.
    """
    for name in families:
        if name not in FAMILIES:
            hint = did_you_mean(name, list(FAMILIES))
            raise DataError(f"there is no family '{name}'{hint} (known: {', '.join(FAMILIES)})")
    if wrong := [draw for draw in draws if draw < 0]:
        raise DataError(f"draw {wrong[0]} does not exist; give numbers from 0 on")
    for name in families:
        for draw in draws:
            folder = root / f"{name}-{draw}"
            if _is_done(folder):
                continue
            make_family(folder, name, draw)
            say(f"made {folder}: {', '.join(FAMILIES[name].domains)}")


def make_family(folder: Path, name: str, draw: int) -> None:
    """Write the token files, configuration and facts of one family."""
    family = FAMILIES[name]
    entropies: dict[str, float] = {}
    for domain in family.domains:
        if domain in GENERATED:
            language = GENERATED[domain](_seed(domain, draw))
            entropies[domain] = language.entropy
            _write_language(folder / domain, language)
        else:
            _write_text(folder / domain, domain, draw)
    domains = {
        domain: {split: str((folder / domain / split).absolute()) for split in SPLITS}
        for domain in family.domains
    }
    config = {"vocab_size": VOCABULARY, "domains": domains}
    _write(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    facts = {"version": VERSION, "family": name, "draw": draw, "room": family.room}
    _write(folder / FACTS, json.dumps({**facts, "entropies": entropies}, indent=1))


def _seed(domain: str, draw: int) -> int:
    return zlib.crc32(f"{NAME} {domain} {draw}".encode())


def _write_language(folder: Path, language: Language) -> None:
    for number, split in enumerate(SPLITS):
        text = language.write(_DOCUMENTS[split], _DOCUMENT, seed=number)
        _write_tokens(folder / split, text)


def _write_text(folder: Path, name: str, draw: int) -> None:
    """Write a half of a real text; even draws have one, odd draws the other."""
    every = list(take_bytes(RepeatFilter()(TEXTS[name]()), _TEXT_BYTES))
    half = [document for document in every if document.digest[0] % 2 == draw % 2]
    # Held-out parts of equal size keep the noise of their losses alike.
    splits = split_documents(
        half, valid_share=0.0, test_share=0.0, least_bytes=_least(half, _LEAST_HELD_OUT)
    )
    for split, documents in splits.items():
        codes = [np.frombuffer(_ascii(one.text), np.uint8) for one in documents]
        _write_tokens(folder / split, [code.astype(np.uint16) for code in codes])


def _least(documents: Sequence[Document], wanted: int) -> int:
    # A fourth of a small text for both held-out parts is the most that is allowed.
    return min(wanted, sum(document.size for document in documents) // 8)


def _ascii(text: str) -> bytes:
    return text.encode("ascii", "replace")


def _write_tokens(prefix: Path, documents: Tokens | Sequence[Tokens]) -> None:
    with TokenWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(document)


def _is_done(folder: Path) -> bool:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("version") == VERSION


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
