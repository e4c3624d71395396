"""The loss store: what is written is what is read, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.domain import Domain, open_domain
from megatron.data.loss_header import (
    HEADER_NAME,
    StoreHeader,
    describe_domain,
    file_name,
    read_header,
    write_header,
)
from megatron.data.loss_store import LossStore, stream_starts
from megatron.data.loss_writing import BlockWriter, mark_scored, prepare_store
from megatron.data.writer import TokenWriter
from megatron.errors import DataError

S = 8
SPLIT = "70,30"
NAMES = ("web/high", "code")


def expected(position: np.ndarray, epoch: int) -> np.ndarray:
    """A loss that float16 holds exactly."""
    return ((position * 7 + epoch * 3) % 512) / 16.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prefixes a domain; a token is its own place in the prefix."""
    folder = tmp_path_factory.mktemp("stream")
    random = np.random.default_rng(3)
    for prefix in ("one", "two", "three", "other"):
        with TokenWriter(folder / prefix, np.int32) as writer:
            at = 0
            for length in random.integers(5, 40, 30):
                writer.add(np.arange(at, at + length, dtype=np.int32))
                at += int(length)
    return folder


def domains(data: Path, **changes: Any) -> list[Domain]:
    settings = {"seq_length": S, "seed": 5, "split": (SPLIT, "train"), **changes}
    prefixes = settings.pop("prefixes", {"web/high": ("one", "two"), "code": ("three",)})
    return [
        open_domain(name, [data / prefix for prefix in own], **settings)
        for name, own in prefixes.items()
    ]


def facts(parts: list[Domain], epochs: int = 2, **changes: Any) -> StoreHeader:
    first = parts[0]
    header = StoreHeader(
        seq_length=first.seq_length,
        epoch_offset=first.epoch_offset,
        seed=first.seed if first.epoch_offset else None,
        vocab_size=5000,
        precision="fp32",
        model_hash="m" * 64,
        model={"checkpoint": "runs/ref/checkpoints/global_step9", "step": 9},
        domains={part.name: describe_domain(part, split=SPLIT, epochs=epochs) for part in parts},
    )
    return replace(header, **changes)


def fill(folder: Path, parts: list[Domain], header: StoreHeader, block: int = 5) -> StoreHeader:
    """Score whatever is not, with the losses of :func:`expected`."""
    with BlockWriter(folder, header.domains) as writer:
        for part in parts:
            for array, total in enumerate(header.domains[part.name].windows):
                for first in range(header.domains[part.name].scored[array], total, block):
                    numbers = np.arange(first, min(first + block, total))
                    starts = stream_starts(part, part.stream_windows(array), numbers)
                    losses = expected(starts[:, None] + 1 + np.arange(S), array)
                    writer.write(part.name, array, starts, losses.astype(np.float32))
                    writer.sync()
                    header = mark_scored(folder, header, part.name, array, int(numbers[-1]) + 1)
    return header


def remedy(epochs: int | None) -> str:
    return f"score it ({epochs})"


def open_store(folder: Path, parts: list[Domain], **changes: Any) -> LossStore:
    settings: dict[str, Any] = {
        "splits": {part.name: SPLIT for part in parts},
        "vocab_size": 5000,
        "remedy": remedy,
        **changes,
    }
    return LossStore(folder, parts, **settings)


@pytest.fixture
def made(data: Path, tmp_path: Path) -> Path:
    parts = domains(data)
    folder = tmp_path / "store"
    fill(folder, parts, prepare_store(folder, facts(parts)))
    return folder


def everything(parts: list[Domain], epochs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [
        (number, epoch, sample)
        for number, part in enumerate(parts)
        for epoch in range(epochs)
        for sample in range(part.num_windows(epoch))
    ]
    mixed = np.random.default_rng(0).permutation(np.array(rows))
    return mixed[:, 0].astype(np.int32), mixed[:, 1], mixed[:, 2]


def places(parts: list[Domain], number: int, epoch: int, sample: int) -> np.ndarray:
    """Return where a sample's targets lie in the stream, by its tokens."""
    part = parts[number]
    reader, _ = part.locate(epoch, sample)
    before = 0
    for source in part.sources:
        if source.reader is reader:
            break
        before += source.documents.stop - source.documents.start
    return part.sample(epoch, sample)[1:].astype(np.int64) - source.documents.start + before


def test_every_window_reads_the_losses_of_its_own_tokens(data: Path, made: Path) -> None:
    parts = domains(data)
    store = open_store(made, parts)
    domain, epoch, sample = everything(parts, 2)
    found = store.read(domain, epoch, sample)
    assert found.dtype == np.float32
    assert found.shape == (domain.size, S)
    for row, where in enumerate(zip(domain.tolist(), epoch.tolist(), sample.tolist(), strict=True)):
        at = places(parts, *where)
        assert found[row].tolist() == expected(at, where[1]).tolist()


def test_a_store_may_hold_more_domains_than_a_run_has(data: Path, made: Path) -> None:
    (code,) = [part for part in domains(data) if part.name == "code"]
    store = open_store(made, [code])
    found = store.read(np.zeros(3, dtype=np.int32), np.ones(3, dtype=np.int64), np.arange(3))
    for row in range(3):
        assert found[row].tolist() == expected(places([code], 0, 1, row), 1).tolist()


def test_fixed_cuts_serve_every_epoch_of_every_seed(data: Path, tmp_path: Path) -> None:
    parts = domains(data, epoch_offset=False)
    header = prepare_store(tmp_path, facts(parts, epochs=7))
    assert [len(one.windows) for one in header.domains.values()] == [1, 1]
    fill(tmp_path, parts, header)
    others = domains(data, epoch_offset=False, seed=6)
    store = open_store(tmp_path, others)
    assert store.epochs("code") is None
    store.check_forecast({"code": 1e9})
    domain, epoch, sample = everything(others, 4)
    found = store.read(domain, epoch, sample)
    for row, where in enumerate(zip(domain.tolist(), epoch.tolist(), sample.tolist(), strict=True)):
        assert found[row].tolist() == expected(places(others, *where), 0).tolist()


def refused(action: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DataError) as error:
        action()
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_length": 16}, ("seq_length (store 8, run 16)",)),
        ({"seed": 6}, ("seed (store 5, run 6)",)),
        ({"epoch_offset": False}, ("epoch_offset (store True, run False)",)),
        (
            {"prefixes": {"web/high": ("one", "two"), "code": ("other",)}},
            ("data of 'code' (fingerprint in the store",),
        ),
        (
            {"prefixes": {"web/high": ("two", "one"), "code": ("three",)}},
            ("data of 'web/high' (fingerprint in the store",),
        ),
        (
            {"prefixes": {"news": ("one",), "code": ("three",)}},
            ("no losses of 'news' (it has code, web/high)",),
        ),
        ({"split": ("50,50", "train")}, ("tokens of 'code' (store",)),
    ],
)
def test_windows_of_another_run_are_refused(
    data: Path, made: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(lambda: open_store(made, domains(data, **changes)), *words, "score it (None)")


def test_other_splits_and_vocabularies_are_refused(data: Path, made: Path) -> None:
    parts = domains(data)
    refused(
        lambda: open_store(made, parts, splits={"web/high": None, "code": "70,29,1"}),
        "split of 'web/high' (store '70,30', run None)",
        "split of 'code' (store '70,30', run '70,29,1')",
    )
    refused(lambda: open_store(made, parts, vocab_size=5001), "vocab_size (store 5000, run 5001)")
    # The same shares in another spelling are the same.
    open_store(made, parts, splits=dict.fromkeys(NAMES, "7/3"))


def test_reading_beyond_what_is_scored_is_refused(data: Path, made: Path) -> None:
    parts = domains(data)
    store = open_store(made, parts)
    one, zero = np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    refused(
        lambda: store.read(one, zero + 2, zero),
        "domain 'code' has come to epoch 3",
        "holds the losses of 2",
        "score it (3)",
    )
    there = parts[1].num_windows(0) + parts[1].num_windows(1)
    store.check_forecast({"code": there})
    refused(lambda: store.check_forecast({"code": there + 1.0}), "domain 'code'", "score 3 epochs")


def test_what_was_not_scored_is_an_error_that_names_its_place(data: Path, made: Path) -> None:
    parts = domains(data)
    at = places(parts, 1, 1, 4)[3]
    scores = read_header(made, "").domains["code"]
    path = made / scores.file
    losses = np.memmap(path, dtype="<f2", mode="r+", shape=(2, scores.tokens))
    losses[1, at] = np.nan
    losses.flush()
    store = open_store(made, parts)
    ones = np.ones(1, dtype=np.int64)
    store.read(ones, ones * 0, ones * 4)
    refused(
        lambda: store.read(ones, ones, ones * 4),
        "domain 'code'",
        f"position {at:,} of its stream (epoch 1)",
    )


def test_unfinished_and_damaged_stores_are_refused(data: Path, made: Path) -> None:
    parts = domains(data)
    header = read_header(made, "")
    code = header.domains["code"]
    short = replace(code, scored=(code.scored[0], code.scored[1] - 1))
    write_header(made, replace(header, domains={**header.domains, "code": short}))
    refused(lambda: open_store(made, parts), "unfinished", "domain 'code'", "score it (None)")
    write_header(made, header)
    with open(made / code.file, "r+b") as out:
        out.truncate(code.file_bytes - 2)
    refused(lambda: open_store(made, parts), code.file, f"{code.file_bytes:,}")
    (made / code.file).unlink()
    refused(lambda: open_store(made, parts), code.file, "cannot be read")
    content = json.loads((made / HEADER_NAME).read_text())
    for broken, word in (
        ({**content, "version": 2}, "version 2"),
        ({key: content[key] for key in content if key != "seed"}, "'seed'"),
        ({**content, "domains": 3}, "wrong type"),
    ):
        (made / HEADER_NAME).write_text(json.dumps(broken))
        refused(lambda: open_store(made, parts), word)
    (made / HEADER_NAME).write_text("{")
    refused(lambda: open_store(made, parts), "unreadable")
    (made / HEADER_NAME).unlink()
    refused(lambda: open_store(made, parts), "holds no loss store", "score it (None)")


def test_a_crash_leaves_only_what_is_on_the_disk_and_is_gone_on_from(
    data: Path, made: Path, tmp_path: Path
) -> None:
    parts, folder = domains(data), tmp_path / "again"
    header = prepare_store(folder, facts(parts, epochs=1))
    with BlockWriter(folder, header.domains) as writer:
        starts = stream_starts(parts[0], parts[0].stream_windows(0), np.arange(7))
        losses = expected(starts[:, None] + 1 + np.arange(S), 0)
        writer.write("web/high", 0, starts, losses)
        writer.sync()
        mark_scored(folder, header, "web/high", 0, 7)
        # Written and not marked; then the process dies.
        starts = stream_starts(parts[0], parts[0].stream_windows(0), np.arange(7, 9))
        writer.write("web/high", 0, starts, np.zeros((2, S)))
    again = prepare_store(folder, facts(parts, epochs=2))
    assert again.domains["web/high"].scored == (7, 0)
    fill(folder, parts, again)
    for name in NAMES:
        one, other = (path / file_name(name) for path in (made, folder))
        assert one.read_bytes() == other.read_bytes()
    assert read_header(folder, "") == read_header(made, "")
    # Fewer epochs take nothing away.
    assert prepare_store(folder, facts(parts, epochs=1)) == again_complete(folder)


def again_complete(folder: Path) -> StoreHeader:
    header = read_header(folder, "")
    assert all(scores.complete for scores in header.domains.values())
    return header


def test_domains_are_added_and_those_there_stay(data: Path, made: Path, tmp_path: Path) -> None:
    parts, folder = domains(data), tmp_path / "again"
    fill(folder, parts[1:], prepare_store(folder, facts(parts[1:])))
    refused(lambda: open_store(folder, parts), "no losses of 'web/high' (it has code)")
    header = prepare_store(folder, facts(parts[:1]))
    assert header.domains["code"].complete
    fill(folder, parts, header)
    for name in NAMES:
        one, other = (path / file_name(name) for path in (made, folder))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_hash": "n" * 64}, f"model_hash (store '{'m' * 64}', run '{'n' * 64}')"),
        ({"precision": "bf16"}, "precision (store 'fp32', run 'bf16')"),
        ({"vocab_size": 7}, "vocab_size (store 5000, run 7)"),
    ],
)
def test_a_store_of_something_else_is_not_added_to(
    data: Path, made: Path, changes: dict[str, Any], word: str
) -> None:
    before = (made / HEADER_NAME).read_bytes()
    wanted = facts(domains(data), **changes)
    refused(lambda: prepare_store(made, wanted), word, "give another --out")
    assert (made / HEADER_NAME).read_bytes() == before


def test_losses_are_cut_at_64_and_must_be_numbers(data: Path, tmp_path: Path) -> None:
    (part,) = domains(data, prefixes={"code": ("three",)})
    header = prepare_store(tmp_path, facts([part], epochs=1))
    starts = stream_starts(part, part.stream_windows(0), np.arange(2))
    losses = np.full((2, S), 1.0)
    losses[0, 1], losses[1, 2], losses[1, 3] = 63.97, 65.0, np.inf
    with BlockWriter(tmp_path, header.domains) as writer:
        writer.write("code", 0, starts, losses)
        losses[1, 5] = np.nan
        refused(
            lambda: writer.write("code", 0, starts, losses),
            f"position {starts[1] + 6} of domain 'code'",
            "not a number",
        )
    held = np.fromfile(tmp_path / file_name("code"), "<f2")
    assert held[starts[0] + 1 : starts[0] + 1 + S].tolist() == [1, 63.96875, *[1] * 6]
    assert held[starts[1] + 1 : starts[1] + 1 + S].tolist() == [1, 1, 64, 64, *[1] * 4]
    assert np.isnan(held[: starts[0] + 1]).all()
