"""The header of a loss store: what was scored, by which model, and where its windows were cut.

    STORE/header.json        replaced atomically; what it calls scored is on the disk
    STORE/<domain>.f16       [epochs, tokens] float16, little-endian: min(loss, 64) in nats

A loss lies at the position of the *predicted* token in the domain's training stream (its
sources one after the other).  NaN marks what was not scored.  Where the cuts of windows move
between epochs, the same token is predicted from another context in each: there is one array per
epoch, good for one seed.  Where they stay (``epoch_offset: false``), one array serves every epoch
of every seed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from megatron.data.domain import Domain
from megatron.data.sources import Source
from megatron.data.splits import parse_split
from megatron.errors import ConfigError, DataError

STORE_VERSION: Final = 1
HEADER_NAME: Final = "header.json"
LARGEST_LOSS: Final = 64.0
LOSS_TYPE: Final = np.dtype("<f2")
_LONGEST_NAME = 180


@dataclass(frozen=True, kw_only=True)
class DomainScores:
    """What a store holds of one domain.

    Attributes:
        file: name of its file in the store.
        tokens: of the domain's training stream.
        fingerprint: of that stream, see :func:`stream_fingerprint`.
        split: shares of documents that the stream is the training part of; None where the
            domain has files of its own for training.
        windows: number of windows of each epoch.
        scored: how many of those are scored, in the order of the stream.
    """

    file: str
    tokens: int
    fingerprint: str
    split: str | None
    windows: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether every window is scored."""
        return self.scored == self.windows

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.windows) * self.tokens * LOSS_TYPE.itemsize


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """Everything that a store's losses depend on, and what is there.

    Attributes:
        seq_length: S; a window has S + 1 tokens and gives S losses.
        epoch_offset: whether the cuts of windows move between epochs.
        seed: that moves them; None where they stay.
        vocab_size: token ids of the model that scored.
        precision: in which it ran.
        model_hash: of the checkpoint that scored.
        model: what else is worth knowing of it (its folder, step and size), not compared.
        domains: what there is of each, by name.
    """

    seq_length: int
    epoch_offset: bool
    seed: int | None
    vocab_size: int
    precision: str
    model_hash: str
    model: Mapping[str, Any] = field(default_factory=dict)
    domains: Mapping[str, DomainScores] = field(default_factory=dict)


def read_header(folder: Path, remedy: str) -> StoreHeader:
    """Read a store's header.

    Args:
        folder: of the store.
        remedy: what to do where there is none.

    Raises:
        DataError: there is none, it is damaged, or it is of another version.
    """
    path = folder / HEADER_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder} holds no loss store ({HEADER_NAME} is missing); {remedy}") from (
            None
        )
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable ({error}); remove the store and {remedy}") from None
    try:
        if content["version"] != STORE_VERSION:
            raise DataError(
                f"{path}: version {content['version']!r}, this software reads {STORE_VERSION}; "
                f"remove the store and {remedy}"
            )
        return header_of(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: a field is missing or of the wrong type ({type(error).__name__}: {error}); "
            f"remove the store and {remedy}"
        ) from None


def header_of(content: Mapping[str, Any]) -> StoreHeader:
    """Return the header that ``asdict`` turned into plain values.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are not a header's.
    """
    fields = {name: content[name] for name in StoreHeader.__dataclass_fields__}
    fields["domains"] = {name: _scores(one) for name, one in content["domains"].items()}
    return StoreHeader(**fields)


def write_header(folder: Path, header: StoreHeader) -> None:
    """Replace a store's header atomically; a crash leaves the old or the new one."""
    path = folder / HEADER_NAME
    temporary = path.with_name(path.name + ".tmp")
    content = {"version": STORE_VERSION, **asdict(header)}
    with open(temporary, "w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def _scores(content: Mapping[str, Any]) -> DomainScores:
    split = content["split"]
    return DomainScores(
        file=str(content["file"]),
        tokens=int(content["tokens"]),
        fingerprint=str(content["fingerprint"]),
        split=None if split is None else str(split),
        windows=tuple(int(count) for count in content["windows"]),
        scored=tuple(int(count) for count in content["scored"]),
    )


def file_name(domain: str) -> str:
    """Return the name of a domain's file, whatever its own name is (``web/high``)."""
    name = quote(domain, safe="")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(domain.encode()).hexdigest()[:16]}"
    return name + ".f16"


def stream_fingerprint(sources: Iterable[Source]) -> str:
    """Return a hash of the stream of tokens that a domain's sources make one after the other.

    It depends neither on the domain's name nor on a run's seed.
    """
    digest = hashlib.sha256()
    for source in sources:
        part = source.documents
        facts = [source.reader.fingerprint(), part.first, part.last, part.start, part.stop]
        digest.update(repr(facts).encode() + b"\x1f")
    return digest.hexdigest()


def describe_domain(domain: Domain, *, split: str | None, epochs: int) -> DomainScores:
    """Return what a store with nothing scored yet says of a domain.

    Args:
        domain: opened on its training part.
        split: shares that it is a part of; None where it has files of its own.
        epochs: passes to be scored; one array serves all where the cuts do not move.
    """
    arrays = epochs if domain.epoch_offset else 1
    windows = tuple(domain.num_windows(epoch) for epoch in range(arrays))
    return DomainScores(
        file=file_name(domain.name),
        tokens=domain.num_tokens,
        fingerprint=stream_fingerprint(domain.sources),
        split=split,
        windows=windows,
        scored=(0,) * arrays,
    )


def same_split(one: str | None, other: str | None) -> bool:
    """Tell whether two splits give the same shares, however they are written."""
    if one is None or other is None:
        return one is other
    try:
        return bool(np.allclose(parse_split(one), parse_split(other), rtol=0, atol=1e-12))
    except ConfigError:
        return False


def differences(
    found: StoreHeader, wanted: Mapping[str, Any], domains: Mapping[str, DomainScores]
) -> list[str]:
    """Return one phrase for every fact of a store that is not as a run wants it.

    Args:
        found: the store's header.
        wanted: values that must be the same, by the name of the header's field.
        domains: the same of each domain; progress is not compared.
    """
    phrases = [
        f"{name} (store {getattr(found, name)!r}, run {value!r})"
        for name, value in wanted.items()
        if getattr(found, name) != value
    ]
    for name, run in domains.items():
        store = found.domains.get(name)
        if store is None:
            continue
        if not same_split(store.split, run.split):
            phrases.append(f"split of '{name}' (store {store.split!r}, run {run.split!r})")
        if store.tokens != run.tokens:
            phrases.append(f"tokens of '{name}' (store {store.tokens:,}, run {run.tokens:,})")
        if store.fingerprint != run.fingerprint:
            phrases.append(
                f"data of '{name}' (fingerprint in the store {store.fingerprint[:16]}…, of the "
                f"run {run.fingerprint[:16]}…)"
            )
        shared = min(len(store.windows), len(run.windows))
        if store.windows[:shared] != run.windows[:shared]:
            phrases.append(
                f"windows of '{name}' (store {store.windows[:shared]}, run {run.windows[:shared]})"
            )
    return phrases
