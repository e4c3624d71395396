"""The byte layout, and what the writer promises."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import reader as reader_module
from megatron.data.index_format import token_dtype
from megatron.data.reader import TokenReader
from megatron.data.sidecar import FileStamp, Sidecar, read_sidecar, write_sidecar
from megatron.data.writer import TokenWriter, merge
from megatron.errors import DataError, RunError

MakeDataset = Callable[..., str]


def by_hand(documents: list[list[int]], code: int, kind: str) -> tuple[bytes, bytes]:
    """Lay out an index and its data from the format's description alone."""
    tokens = [token for document in documents for token in document]
    data = struct.pack(f"<{len(tokens)}{kind}", *tokens)
    itemsize = struct.calcsize(kind)
    sizes = [len(document) for document in documents]
    pointers = [itemsize * sum(sizes[:place]) for place in range(len(sizes))]
    count = len(documents)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i", *sizes) + struct.pack(f"<{count}q", *pointers)
    return index + struct.pack(f"<{count + 1}q", *range(count + 1)), data


KINDS = [("uint8", 1, "B"), ("int32", 4, "i"), ("int64", 5, "q"), ("uint16", 8, "H")]


@pytest.mark.parametrize(("dtype", "code", "kind"), KINDS)
def test_written_bytes_are_the_format(tmp_path: Path, dtype: str, code: int, kind: str) -> None:
    documents = [[1, 2, 3], [], [250], [7] * 20, []]
    index, data = by_hand(documents, code, kind)
    with TokenWriter(tmp_path / "a", dtype) as writer:
        for document in documents:
            writer.add(document)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert (tmp_path / "a.bin").read_bytes() == data
    reader = TokenReader(tmp_path / "a")
    assert reader.dtype == np.dtype(dtype)
    assert [reader.document_start(i) for i in range(6)] == [0, 3, 3, 4, 24, 24]
    assert reader.read(0, reader.num_tokens).tolist() == [t for d in documents for t in d]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), data=st.data())
def test_reading_equals_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    prefix = tmp_path_factory.mktemp("written") / "a"
    total = sum(lengths)
    tokens = np.arange(total) * 7 % 50000
    cut = data.draw(st.integers(0, len(lengths)))
    with TokenWriter(prefix, "uint16") as writer:
        at = 0
        for length in lengths[:cut]:
            writer.add(tokens[at : at + length])
            at += length
        writer.add_many(tokens[at:], lengths[cut:])
    starts = np.cumsum([0, *lengths])
    with TokenReader(prefix) as reader:
        assert (reader.num_documents, reader.num_tokens) == (len(lengths), total)
        reader.verify_index(block=data.draw(st.integers(1, 50)))
        assert [reader.document_start(i) for i in range(len(lengths) + 1)] == starts.tolist()
        start = data.draw(st.integers(0, total))
        stop = data.draw(st.integers(start, total))
        assert reader.read(start, stop).tolist() == tokens[start:stop].tolist()
        expected = sorted({s for s in starts[:-1].tolist() if start <= s < stop})
        assert reader.document_starts(start, stop).tolist() == expected
        if start < total:
            document = reader.document_at(start)
            assert starts[document] <= start < starts[document + 1]


def test_token_type_follows_neox() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_nothing_looks_complete_before_close(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "a", "uint16")
    writer.add([1, 2, 3])
    writer.flush()
    assert not (tmp_path / "a.bin").exists()
    assert not (tmp_path / "a.idx").exists()
    with pytest.raises(DataError, match="no such file"):
        TokenReader(tmp_path / "a")
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: TokenWriter) -> None:
        writer.add([1])
        raise KeyError

    with pytest.raises(KeyError), TokenWriter(tmp_path / "a", "uint16") as writer:
        fail(writer)
    assert list(tmp_path.iterdir()) == []


class Crash(BaseException):
    """Stands for the process's death."""


@pytest.mark.parametrize("old", [False, True])
def test_a_crash_at_any_call_of_close_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    """Whatever call was the last one, what opens is the new dataset, whole, or the old one."""
    outcomes = set()
    for last in range(12):
        folder = tmp_path / str(last)
        prefix = folder / "a"
        if old:
            with TokenWriter(prefix, "uint16") as writer:
                writer.add([9, 9, 9])
                writer.add([8])
        writer = TokenWriter(prefix, "uint16")
        writer.add([1, 2])
        writer.add([3, 4])
        calls = 0
        with monkeypatch.context() as patch:

            def dying(real, limit=last):
                def call(*arguments, **options):
                    nonlocal calls
                    calls += 1
                    if calls > limit:
                        raise Crash
                    return real(*arguments, **options)

                return call

            for name in ("fsync", "replace", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            with contextlib.suppress(Crash):
                writer.close()
        try:
            with TokenReader(prefix) as reader:
                reader.verify_index()
                outcomes.add(tuple(reader.read(0, reader.num_tokens).tolist()))
        except DataError:
            outcomes.add(None)
    assert outcomes == {None, (1, 2, 3, 4)} | ({(9, 9, 9, 8)} if old else set())


def test_a_new_dataset_takes_the_old_sidecar_away(dataset: MakeDataset) -> None:
    prefix = dataset("a", [3, 4])
    write_sidecar(prefix, sidecar_of(prefix))
    assert TokenReader(prefix).bytes_per_token == pytest.approx(4.0)
    dataset("a", [3, 5])
    assert TokenReader(prefix).bytes_per_token is None


def test_resume_continues_at_the_flushed_point(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "whole", "uint16") as writer:
        for first in range(50):
            writer.add(np.arange(first))
    writer = TokenWriter(tmp_path / "a", "uint16", keep_partial=True)
    for first in range(20):
        writer.add(np.arange(first))
    point = writer.flush()
    writer.add([1, 2, 3])  # written after the point: cut away again
    writer.abort()
    assert point == (20, 190)
    with TokenWriter(tmp_path / "a", "uint16", resume=point) as writer:
        for first in range(20, 50):
            writer.add(np.arange(first))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_resume_refuses_a_point_the_files_do_not_hold(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "a", "uint16", keep_partial=True)
    writer.add([1, 2, 3])
    writer.abort()
    with pytest.raises(DataError, match="start again"):
        TokenWriter(tmp_path / "a", "uint16", resume=(9, 90))


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 65536), ("uint16", -1), ("int32", 2**31)])
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, dtype: str, token: int) -> None:
    with pytest.raises(DataError, match="does not fit"), TokenWriter(tmp_path / "a", dtype) as out:
        out.add(np.array([1, token], dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def test_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="integers"), TokenWriter(tmp_path / "a", "uint16") as out:
        out.add(np.array([1.5]))
    with pytest.raises(DataError, match="cannot be stored"):
        TokenWriter(tmp_path / "a", "float32")


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    writer = TokenWriter(tmp_path / "a", "uint16")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    writer._bin.close()
    writer._bin = full
    with pytest.raises(RunError, match="No space left"):
        writer.add(np.arange(100))
    writer.abort()


def test_merge_joins_in_order(dataset: MakeDataset, tmp_path: Path) -> None:
    one, two, empty = (
        dataset("one", [3, 0, 5]),
        dataset("two", [2, 7], first=100),
        dataset("empty", []),
    )
    merge([one, empty, two, one], tmp_path / "all")
    with TokenReader(tmp_path / "all") as reader:
        reader.verify_index()
        expected = [*range(8), *range(100, 109), *range(8)]
        assert reader.read(0, reader.num_tokens).tolist() == expected
        assert reader.document_sizes(0, 8).tolist() == [3, 0, 5, 2, 7, 3, 0, 5]
    with pytest.raises(DataError, match="int32"):
        merge([one, dataset("wide", [2], dtype="int32")], tmp_path / "mixed")
    with pytest.raises(DataError, match="both an input and the output"):
        merge([one, two], one)
    with pytest.raises(DataError, match="at least one"):
        merge([], tmp_path / "none")
    assert not list(tmp_path.glob("*.tmp"))


def sidecar_of(prefix: str) -> Sidecar:
    with TokenReader(prefix) as reader:
        return Sidecar(
            documents=reader.num_documents,
            tokens=reader.num_tokens,
            bytes=reader.num_tokens * 4,
            dtype=reader.dtype.name,
            vocab_size=60000,
            append_eod=True,
            eod_id=0,
            tokenizer={"type": "HFTokenizer", "sha256": "00"},
            bin=FileStamp(size=os.path.getsize(prefix + ".bin"), sha256="aa"),
            idx=FileStamp(size=os.path.getsize(prefix + ".idx"), sha256="bb"),
        )


def test_sidecar_round_trip_and_mismatch(dataset: MakeDataset) -> None:
    prefix = dataset("a", [3, 4])
    sidecar = sidecar_of(prefix)
    write_sidecar(prefix, sidecar)
    assert read_sidecar(prefix) == sidecar
    assert json.loads(Path(prefix + ".meta.json").read_text())["version"] == 1
    for change in ({"documents": 3}, {"tokens": 8}, {"dtype": "int32"}):
        write_sidecar(prefix, replace(sidecar, **change))
        with pytest.raises(DataError, match="does not belong"):
            TokenReader(prefix)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", '{"version": 2}', '{"version": 1}', "\xff", "[" * 99999]
)
def test_a_damaged_sidecar_is_a_data_error(dataset: MakeDataset, text: str) -> None:
    prefix = dataset("a", [3, 4])
    Path(prefix + ".meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="delete it"):
        TokenReader(prefix)


def test_fingerprint_follows_content_only(dataset: MakeDataset, tmp_path: Path) -> None:
    first = TokenReader(dataset("a", [3, 4, 5])).fingerprint()
    assert TokenReader(dataset("b", [3, 4, 5])).fingerprint() == first
    assert TokenReader(dataset("c", [3, 5, 4])).fingerprint() != first
    assert TokenReader(dataset("d", [3, 4, 5], first=1)).fingerprint() != first


def test_fingerprint_of_large_files_reads_little(
    dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = dataset("large", [3_000_000, 1])
    reader = TokenReader(prefix)
    read = 0
    real = os.pread

    def counting(descriptor: int, count: int, at: int) -> bytes:
        nonlocal read
        read += count
        return real(descriptor, count, at)

    monkeypatch.setattr(reader_module.os, "pread", counting)
    before = reader.fingerprint()
    assert 0 < read < 300_000
    with open(prefix + ".bin", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x17")
    assert reader.fingerprint() != before


def test_more_prefixes_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    """A run of many domains must not fail at a shell's default of 1,024 open files."""
    script = """
import resource, sys
from megatron.data.reader import TokenReader
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
readers = [TokenReader(sys.argv[1]) for _ in range(60)]
print(sum(reader.num_tokens for reader in readers))
"""
    import subprocess
    import sys

    with TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add([1, 2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.strip() == "120"
