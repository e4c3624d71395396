"""Reading blocks of a study file: strict keys, and errors that name file and key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Block:
    """One mapping of the file.

    Attributes:
        file: the file.
        place: dotted name of the block in it; empty for the whole file.
        content: what it holds.
    """

    file: Path
    place: str
    content: Mapping[str, Any]

    def wrong(self, key: str, why: str) -> ConfigError:
        """Return the error about a key."""
        name = ".".join(part for part in (self.place, key) if part)
        return ConfigError(f"{self.file}: {name}: {why}")

    def only(self, *known: str) -> None:
        """Refuse keys that nobody reads.

        Raises:
            ConfigError: there is one.
        """
        for key in self.content:
            if key not in known:
                hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
                raise self.wrong(key, f"there is no such key{hint}")

    def has(self, key: str) -> bool:
        """Tell whether a key is given, and not null."""
        return self.content.get(key) is not None

    def block(self, key: str, *, required: bool = False) -> Block:
        """Return the block under a key; an empty one where it is left out."""
        given = self.content.get(key)
        if given is None and not required:
            given = {}
        if not isinstance(given, Mapping):
            raise self.wrong(key, f"is {given!r}; give a block of keys")
        place = ".".join(part for part in (self.place, key) if part)
        return Block(file=self.file, place=place, content={str(k): v for k, v in given.items()})

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        given = self.content.get(key, default)
        if not isinstance(given, str) or not given:
            raise self.wrong(key, f"is {given!r}; give a text")
        return given

    def choice(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """Return one of some words."""
        given = self.content.get(key, default)
        if given not in known:
            hint = did_you_mean(str(given), known)
            raise self.wrong(key, f"is {given!r}; it must be one of {', '.join(known)}{hint}")
        return str(given)

    def number(self, key: str, default: float, fits: Callable[[float], bool], must: str) -> float:
        """Return a number; ``must`` says in words what ``fits`` asks."""
        given = self.content.get(key, default)
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise self.wrong(key, f"is {given!r}; give a number, {must}")
        if not math.isfinite(given) or not fits(given):
            raise self.wrong(key, f"is {given}; it must be {must}")
        return float(given)

    def whole(self, key: str, default: int, least: int) -> int:
        """Return a whole number of at least ``least``."""
        given = self.content.get(key, default)
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise self.wrong(key, f"is {given!r}; give a whole number from {least} on")
        return given

    def seeds(self, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Return different seeds."""
        given = self.content.get(key, list(default))
        whole = isinstance(given, list | tuple) and all(
            isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in given
        )
        if not whole or len(set(given)) != len(given):
            raise self.wrong(key, f"is {given!r}; give a list of different numbers from 0 on")
        return tuple(given)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return one text or a list of them."""
        given = self.content.get(key)
        many = [given] if isinstance(given, str) else given
        if not isinstance(many, list) or not all(isinstance(one, str) and one for one in many):
            raise self.wrong(key, f"is {given!r}; give a text or a list of texts")
        return tuple(many)


def read_block(file: Path) -> Block:
    """Read a YAML file as one block.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; name a study file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file}: holds no mapping; a study file has the keys tasks and methods")
    return Block(file=file, place="", content={str(key): value for key, value in content.items()})
