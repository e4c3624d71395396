"""R8, R9, R10: damaged data, damaged checkpoints, and caches of what has changed since."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from support.campaign.row import Bench, Trial, attempt, must

from megatron.checkpoint import CheckpointStore
from megatron.checkpoint.manifest import MANIFEST_NAME
from megatron.data.domain import Domain, open_domain
from megatron.data.ingest.stamps import stamp
from megatron.data.ingest.verify import verify_dataset
from megatron.data.loss_header import StoreHeader, describe_domain
from megatron.data.loss_store import LossStore, stream_starts
from megatron.data.loss_writing import BlockWriter, mark_scored, prepare_store
from megatron.data.reader import TokenReader
from megatron.data.sidecar import Sidecar, write_sidecar
from megatron.data.writer import TokenWriter
from megatron.errors import DataError

HEADER = 34  # bytes of an .idx before the sizes of the documents
CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
SIZES = {"uint8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2}


def dataset(prefix: Path, chance: random.Random) -> str:
    """Write a dataset of random documents with checksums beside it; return its token type."""
    dtype = chance.choice(["uint8", "uint16", "int32"])
    lengths = [chance.randint(0, 12) for _ in range(chance.randint(2, 30))] + [3]
    values = np.random.default_rng(chance.randint(0, 2**31))
    tokens = values.integers(0, 120, sum(lengths))
    with TokenWriter(prefix, dtype) as writer:
        writer.add_many(tokens.astype(dtype), lengths)
    write_sidecar(
        prefix,
        Sidecar(
            documents=len(lengths),
            tokens=sum(lengths),
            bytes=4 * sum(lengths),
            dtype=dtype,
            vocab_size=120,
            append_eod=False,
            eod_id=None,
            bin=stamp(f"{prefix}.bin"),
            idx=stamp(f"{prefix}.idx"),
        ),
    )
    return dtype


def _change(path: str, change: Callable[[bytearray], object]) -> None:
    content = bytearray(Path(path).read_bytes())
    changed = change(content)
    Path(path).write_bytes(content if changed is None else bytes(changed))  # type: ignore[call-overload]


def _flip(content: bytearray, bit: int) -> None:
    content[bit // 8] ^= 1 << bit % 8


# What is refused when the dataset is opened.


def _truncated(prefix: str, chance: random.Random, dtype: str) -> None:
    path = prefix + chance.choice([".bin", ".idx"])
    _change(path, lambda content: content[: chance.randrange(len(content))])


def _too_long(prefix: str, chance: random.Random, dtype: str) -> None:
    path = prefix + chance.choice([".bin", ".idx"])
    _change(path, lambda content: content + chance.randbytes(chance.randint(1, 40)))


def _wrong_type(prefix: str, chance: random.Random, dtype: str) -> None:
    others = [code for name, code in CODES.items() if SIZES[name] != SIZES[dtype]]
    code = chance.choice([*others, 0, 6, 7, 9, 255])
    _change(prefix + ".idx", lambda content: content.__setitem__(17, code))


def _foreign(prefix: str, chance: random.Random, dtype: str) -> None:
    kinds = (b"TNTIDX\0\0" + b"\0" * 90, b"PAR1" + b"\0" * 99, b'{"text": 1}\n' * 9, b"\0" * 200)
    content = chance.choice([*kinds, chance.randbytes(200)])
    Path(prefix + ".idx").write_bytes(content)


def _swapped(prefix: str, chance: random.Random, dtype: str) -> None:
    suffix = chance.choice([".bin", ".idx"])
    other = Path(prefix).with_name("other")
    for number in range(100):
        dataset(other, random.Random(f"{chance.random()} {number}"))
        ours, theirs = (Path(f"{one}.bin").stat().st_size for one in (prefix, other))
        if ours != theirs:
            break
    shutil.move(f"{other}{suffix}", prefix + suffix)


def _missing(prefix: str, chance: random.Random, dtype: str) -> None:
    os.remove(prefix + chance.choice([".bin", ".idx"]))


# What may pass when it is opened, and is found by --verify.


def _flipped(prefix: str, chance: random.Random, dtype: str) -> None:
    path = prefix + chance.choice([".bin", ".idx"])
    first = 0 if path.endswith(".bin") else HEADER * 8
    last = Path(path).stat().st_size * 8
    _change(path, lambda content: _flip(content, chance.randrange(first, last)))


def _header_flipped(prefix: str, chance: random.Random, dtype: str) -> None:
    _change(prefix + ".idx", lambda content: _flip(content, chance.randrange(HEADER * 8)))


def _same_size_type(prefix: str, chance: random.Random, dtype: str) -> None:
    same = {"uint16": "int16", "uint8": "int16", "int32": "int64"}[dtype]
    _change(prefix + ".idx", lambda content: content.__setitem__(17, CODES[same]))


def _pointer(prefix: str, chance: random.Random, dtype: str) -> None:
    with TokenReader(prefix) as reader:
        documents = reader.num_documents
    at = HEADER + 4 * documents + 8 * chance.randrange(documents)
    value = chance.choice([-1, 2**62, chance.randint(-(2**40), 2**40)])

    def write(content: bytearray) -> None:
        struct.pack_into("<q", content, at, value)

    _change(prefix + ".idx", write)


AT_OPEN = (_truncated, _too_long, _wrong_type, _foreign, _swapped, _missing)
BY_VERIFY = (_flipped, _header_flipped, _same_size_type, _pointer)


def damaged_data(bench: Bench, trials: int) -> Iterator[Trial]:
    """R8: datasets that are truncated, flipped, swapped, foreign or of a wrong type."""
    kinds = (*AT_OPEN, *BY_VERIFY)
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        yield attempt(partial(_damage_once, bench, number, kind))


def _damage_once(
    bench: Bench, number: int, kind: Callable[[str, random.Random, str], None]
) -> None:
    folder, chance = bench.fresh(f"data{number}"), bench.chance(number)
    prefix = str(folder / "a")
    kind(prefix, chance, dataset(Path(prefix), chance))
    refused = False
    try:
        with TokenReader(prefix) as reader:
            # A run meets a DataError at worst, whatever it reads.
            with contextlib.suppress(DataError):
                reader.read(0, reader.num_tokens)
            with contextlib.suppress(DataError):
                domain = open_domain("d", [prefix], seq_length=2, seed=0)
                for index in range(domain.num_windows(0)):
                    domain.sample(0, index)
    except DataError:
        refused = True
    if kind in AT_OPEN:
        must(refused, f"{kind.__name__}: the dataset was opened")
    must(verify_dataset(prefix).problems, f"{kind.__name__}: --verify finds nothing")
    shutil.rmtree(folder)


FILES = {
    "mp_rank_00_model_states.pt": 3000,
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": 5000,
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": 5000,
    "state.json": 300,
}


def damaged_checkpoints(bench: Bench, trials: int) -> Iterator[Trial]:
    """R9: flipped, cut, missing, extra and exchanged files of the newest checkpoint."""
    store = CheckpointStore(bench.folder / "checkpoints")
    for step in (10, 20):
        temporary = store.begin(step)
        for name, size in FILES.items():
            (temporary / name).write_bytes(bench.chance(step, name).randbytes(size))
        store.commit(step, store.seal_files(temporary / name for name in FILES))
    template = bench.folder / "template"
    shutil.copytree(store.path(20), template)
    for number in range(trials):
        shutil.rmtree(store.path(20))
        shutil.copytree(template, store.path(20))
        yield attempt(partial(_damage_checkpoint, store, bench.chance(number), number))
    must(trials == 0 or store.newest_valid() is not None, "nothing is left")


def _damage_checkpoint(store: CheckpointStore, chance: random.Random, number: int) -> None:
    folder = store.path(20)
    path = folder / chance.choice([*FILES, MANIFEST_NAME])
    content = bytearray(path.read_bytes())
    kind = ("flip", "cut", "missing", "extra", "swap", "zeros")[number % 6]
    if kind == "flip":
        _flip(content, chance.randrange(len(content) * 8))
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "missing":
        path.unlink()
    elif kind == "extra":
        (folder / f"extra{chance.randint(0, 99)}.pt").write_bytes(chance.randbytes(9))
    elif kind == "swap":
        one, other = (folder / name for name in list(FILES)[1:3])
        held = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(held)
    else:
        first = chance.randrange(len(content))
        content[first : first + 512] = b"\0" * len(content[first : first + 512])
        path.write_bytes(content)
    said: list[str] = []
    found = store.newest_valid(said.append)
    must(found is not None and found[1].step == 10, f"{kind} of {path.name} was not noticed")
    must(len(said) == 1 and str(folder) in said[0], f"{kind}: said {said}")


def changed_since(bench: Bench, trials: int) -> Iterator[Trial]:
    """R10: split, seed or content changed while what an earlier run left is there."""
    for number in range(trials):
        yield attempt(partial(_change_once, bench, number))


def _domain(prefix: Path, split: str, seed: int) -> Domain:
    return open_domain("d", [prefix], seq_length=4, seed=seed, split=(split, "train"))


def _samples(domain: Domain) -> list[list[int]]:
    return [domain.sample(0, index).tolist() for index in range(domain.num_windows(0))]


def _change_once(bench: Bench, number: int) -> None:
    chance, folder = bench.chance(number), bench.fresh(f"change{number}")
    kind = ("split", "seed", "content")[number % 3]
    split, seed, prefix = "70,30", chance.randint(0, 999), folder / "a"
    dataset(prefix, chance)
    there = sorted(os.listdir(folder))
    first = _domain(prefix, split, seed)
    before, described = _samples(first), describe_domain(first, split=split, epochs=1)
    store = folder / "losses"
    header = StoreHeader(
        seq_length=4, epoch_offset=first.epoch_offset, seed=seed, vocab_size=120,
        precision="fp32", model_hash="0" * 64, model={}, domains={"d": described},
    )  # fmt: skip
    _score(store, first, header)
    _open_store(store, first, split)
    must(sorted(os.listdir(folder)) == sorted([*there, "losses"]), "a cache lies beside the data")
    if kind == "split":
        split = "40,60"
    elif kind == "seed":
        seed += 1
    else:
        for name in there:
            (folder / name).unlink()
        dataset(prefix, bench.chance(number, "other"))
    other = bench.fresh(f"clean{number}")
    for name in there:
        shutil.copy(folder / name, other / name)
    after = _domain(prefix, split, seed)
    must(_samples(after) == _samples(_domain(other / "a", split, seed)), "not as in a clean folder")
    must(_samples(after) != before, f"the {kind} changed nothing")
    refused = ""
    try:
        _open_store(store, after, split)
    except DataError as error:
        refused = str(error)
    must(refused, f"stored losses are used though the {kind} has changed")


def _score(folder: Path, domain: Domain, facts: StoreHeader) -> None:
    header = prepare_store(folder, facts)
    with BlockWriter(folder, header.domains) as writer:
        numbers = np.arange(header.domains["d"].windows[0])
        starts = stream_starts(domain, domain.stream_windows(0), numbers)
        writer.write("d", 0, starts, np.ones((numbers.size, 4), dtype=np.float32))
        writer.sync()
        mark_scored(folder, header, "d", 0, numbers.size)


def _open_store(folder: Path, domain: Domain, split: str) -> LossStore:
    return LossStore(
        folder, [domain], splits={"d": split}, vocab_size=120, remedy=lambda epochs: "score it"
    )
