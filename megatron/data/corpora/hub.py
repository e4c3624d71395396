"""Reading a corpus from the Hugging Face hub, or a copy of it on disk, into JSONL by domain.

The documents are streamed: nothing is downloaded that is not read, so a limit in bytes or
documents is all that a sample costs.  Every ``shard_documents`` documents the shards are
closed and the place in the stream is recorded; an interrupted run goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.data.corpora.public import Corpus, Hub
from megatron.errors import DataError, MissingExtraError

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a corpus is wanted.

    Attributes:
        documents: at most so many of each domain; ``None``: all.
        bytes: at most so many bytes of text of each domain; ``None``: all.
    """

    documents: int | None = None
    bytes: int | None = None


@dataclass(kw_only=True)
class _Domain:
    """What one domain holds so far."""

    documents: int = 0
    bytes: int = 0
    shards: int = 0


@dataclass(kw_only=True)
class _Progress:
    """Where the reading stands; written after every closed set of shards."""

    seen: int = 0
    finished: bool = False
    stream: dict[str, Any] | None = None
    domains: dict[str, _Domain] = field(default_factory=dict)


def bring(
    corpus: Corpus,
    folder: Path,
    *,
    source: str | None = None,
    limits: Limits,
    shard_documents: int = 50_000,
    say: Say = print,
) -> dict[str, list[Path]]:
    """Write ``corpus`` into ``folder`` as JSONL shards and return them by domain.

    Args:
        corpus: one whose source is a hub.
        folder: receives ``DOMAIN/shard-NNNNN.jsonl`` and the record of progress.
        source: another repository's name, or a folder that holds a copy.
        limits: how much is wanted of each domain.
        shard_documents: documents read between two records of progress.
        say: receives progress lines.

    Raises:
        DataError: the hub or the copy cannot be read, or holds none of the domains.
        MissingExtraError: the library ``datasets`` is not installed.
    """
    assert isinstance(corpus.source, Hub)
    wanted = {
        "corpus": corpus.name,
        "source": source or corpus.source.repository,
        "documents": limits.documents,
        "bytes": limits.bytes,
    }
    progress = _load(folder, wanted)
    names = corpus.domain_names
    if not progress.finished:
        stream = _open(corpus.source, source)
        if progress.stream is not None:
            say(f"{corpus.name}: going on after {progress.seen} documents")
            stream.load_state_dict(progress.stream)
        _Reader(corpus, names, folder, wanted, limits, progress, say).read(stream, shard_documents)
    empty = [name for name in names.values() if not _held(progress, name).documents]
    if empty:
        raise DataError(
            f"{wanted['source']} holds no document of {', '.join(empty)} "
            f"(field '{corpus.source.domain or corpus.source.text}'): is it {corpus.name}?"
        )
    return {name: sorted((folder / name).glob("shard-*.jsonl")) for name in names.values()}


class _Reader:
    """One pass over the stream."""

    def __init__(
        self,
        corpus: Corpus,
        names: dict[str, str],
        folder: Path,
        wanted: dict[str, Any],
        limits: Limits,
        progress: _Progress,
        say: Say,
    ) -> None:
        assert isinstance(corpus.source, Hub)
        self._corpus, self._hub = corpus, corpus.source
        self._names, self._folder, self._wanted = names, folder, wanted
        self._limits, self._progress, self._say = limits, progress, say
        self._open: dict[str, IO[str]] = {}

    def read(self, stream: Any, shard_documents: int) -> None:
        """Read to the end or to the limits."""
        for record in _guarded(stream, self._wanted["source"]):
            self._progress.seen += 1
            self._take(record)
            if self._full():
                break
            if self._progress.seen % shard_documents == 0:
                self._record(stream.state_dict())
        self._progress.finished = True
        self._record(None)

    def _take(self, record: dict[str, Any]) -> None:
        value = str(value_at(record, self._hub.domain)) if self._hub.domain else ""
        name = self._names.get(value)
        text = value_at(record, self._hub.text)
        if name is None or not isinstance(text, str) or not text.strip():
            return
        held = _held(self._progress, name)
        if self._is_full(held):
            return
        if name not in self._open:
            place = self._folder / name
            place.mkdir(parents=True, exist_ok=True)
            self._open[name] = (place / f"shard-{held.shards:05d}.jsonl.tmp").open(
                "w", encoding="utf-8"
            )
        self._open[name].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        held.documents += 1
        held.bytes += len(text.encode())

    def _is_full(self, held: _Domain) -> bool:
        documents, size = self._limits.documents, self._limits.bytes
        return (documents is not None and held.documents >= documents) or (
            size is not None and held.bytes >= size
        )

    def _full(self) -> bool:
        return all(self._is_full(_held(self._progress, name)) for name in self._names.values())

    def _record(self, place: dict[str, Any] | None) -> None:
        for name, stream in self._open.items():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            partial = Path(stream.name)
            partial.replace(partial.with_suffix(""))
            self._progress.domains[name].shards += 1
        self._open.clear()
        self._progress.stream = place
        _save(self._folder, self._wanted, self._progress)
        size = sum(held.bytes for held in self._progress.domains.values())
        self._say(
            f"{self._corpus.name}: {self._progress.seen} documents read, {size / 1e6:.1f} MB kept"
        )


def value_at(record: Any, path: str) -> Any:
    """Return ``record``'s value under a dotted path ("meta.set_name"), ``None`` if absent.

    A level that holds JSON as a string is read as what it holds.
    """
    for key in path.split("."):
        if isinstance(record, str):
            try:
                record = json.loads(record)
            except ValueError:
                return None
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def _held(progress: _Progress, name: str) -> _Domain:
    return progress.domains.setdefault(name, _Domain())


def _open(hub: Hub, source: str | None) -> Any:
    """Open the corpus as a stream of records."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "fetching a public corpus") from error
    place = source or hub.repository
    try:
        if source is not None and Path(source).exists():
            return _open_copy(datasets, Path(source), hub)
        return datasets.load_dataset(
            place,
            hub.configuration,
            split=hub.split,
            streaming=True,
            data_files=list(hub.files) or None,
        )
    except Exception as error:
        raise DataError(_why(place, hub, error)) from error


def _open_copy(datasets: Any, folder: Path, hub: Hub) -> Any:
    saved = any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    if saved and not any(folder.glob("*.parquet")):
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            data = data[hub.split]
        return data.to_iterable_dataset()
    return datasets.load_dataset(str(folder), split=hub.split, streaming=True)


def _guarded(stream: Any, source: str) -> Iterator[dict[str, Any]]:
    """Yield the stream's records; a failure in mid-stream says that the run can be continued."""
    iterator = iter(stream)
    while True:
        try:
            record = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"reading {source} stopped: {type(error).__name__}: {_first_line(error)}; "
                "the same command continues from the last shard"
            ) from error
        yield record


def _why(place: str, hub: Hub, error: Exception) -> str:
    kind = type(error).__name__
    if hub.gated and kind in ("DatasetNotFoundError", "GatedRepoError"):
        return (
            f"{place} is given only to those who accepted its terms: do so on its page, then log "
            "in with 'hf auth login' or set HF_TOKEN"
        )
    if isinstance(error, ConnectionError):
        return (
            f"cannot reach {place}: {_first_line(error)}; the same command continues once the "
            "network is there. Without one: give a local copy with --source FOLDER"
        )
    return f"cannot open {place}: {kind}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _load(folder: Path, wanted: dict[str, Any]) -> _Progress:
    """Read the record of progress, and clear away what it does not know of."""
    path = folder / "progress.json"
    progress = _Progress()
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["wanted"] != wanted:
            raise DataError(
                f"{folder} was begun with other settings "
                f"({_differences(record['wanted'], wanted)}); remove it, or give another --data-dir"
            )
        progress = _Progress(
            seen=record["seen"],
            finished=record["finished"],
            stream=record["stream"],
            domains={name: _Domain(**held) for name, held in record["domains"].items()},
        )
    for place in folder.iterdir() if folder.exists() else []:
        if place.is_dir():
            known = progress.domains.get(place.name, _Domain()).shards
            for shard in place.iterdir():
                number = int(shard.name.split("-")[1].split(".")[0])
                if shard.suffix == ".tmp" or number >= known:
                    shard.unlink()
            if not known:
                shutil.rmtree(place)
    return progress


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {before.get(key)} then, {now.get(key)} now"
        for key in now
        if before.get(key) != now.get(key)
    )


def _save(folder: Path, wanted: dict[str, Any], progress: _Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "wanted": wanted,
        "seen": progress.seen,
        "finished": progress.finished,
        "stream": progress.stream,
        "domains": {name: vars(held) for name, held in progress.domains.items()},
    }
    partial = folder / "progress.json.tmp"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / "progress.json")
