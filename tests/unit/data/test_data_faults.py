"""Damaged, foreign and mismatched files: a DataError each, never another traceback."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.domain import open_domain
from megatron.data.reader import TokenReader
from megatron.data.writer import TokenWriter
from megatron.errors import DataError

MakeDataset = Callable[..., str]


LENGTHS = [5, 0, 3, 8, 1, 0, 4, 0]


def use(prefix: str | Path) -> list[int]:
    """Do everything a run does with a prefix; return all tokens."""
    with TokenReader(prefix) as reader:
        for start in range(0, reader.num_tokens, 3):
            reader.document_at(start)
            reader.document_starts(start, min(start + 3, reader.num_tokens))
        for split in (None, ("5,4,1", "train"), ("5,4,1", "valid"), ("5,4,1", "test")):
            try:
                domain = open_domain("d", [prefix], seq_length=2, seed=0, split=split)
            except DataError:
                continue
            for epoch in range(3):
                for index in range(domain.num_windows(epoch)):
                    domain.sample(epoch, index)
                    domain.document_starts(epoch, index)
            domain.fingerprint()
            domain.close()
        return reader.read(0, reader.num_tokens).tolist()


def rewrite(path: str, change: Callable[[bytearray], object]) -> None:
    content = bytearray(Path(path).read_bytes())
    changed = change(content)
    Path(path).write_bytes(content if changed is None else changed)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_anywhere_is_refused(dataset: MakeDataset, suffix: str) -> None:
    """Every length, hence every boundary of the structure, and one byte to either side."""
    prefix = dataset("a", LENGTHS)
    whole = Path(prefix + suffix).read_bytes()
    for length in range(len(whole)):
        Path(prefix + suffix).write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"truncated|empty|damaged|not a dataset"):
            TokenReader(prefix)
    for extra in (b"\0", b"\0" * 8, whole):
        Path(prefix + suffix).write_bytes(whole + extra)
        with pytest.raises(DataError, match="too long"):
            TokenReader(prefix)
    Path(prefix + suffix).write_bytes(whole)
    assert use(prefix) == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
def test_any_flipped_bit_of_the_header_reads_right_or_is_refused(
    dataset: MakeDataset, dtype: str
) -> None:
    prefix = dataset("a", LENGTHS, dtype=dtype)
    whole = Path(prefix + ".idx").read_bytes()
    for bit in range(34 * 8):
        rewrite(prefix + ".idx", lambda content, bit=bit: flip(whole, bit))
        with pytest.raises(DataError):
            use(prefix)


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_damage_reads_right_or_is_refused(tmp_path: Path, examples: int) -> None:
    check = given(
        prefix=st.just(str(tmp_path / "a")),
        dtype=st.sampled_from(["uint8", "int8", "int16", "uint16", "int32", "int64"]),
        lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12),
        header=st.lists(st.integers(0, 34 * 8 - 1), max_size=4),
        cut=st.one_of(st.none(), st.integers(0, 400)),
        which=st.sampled_from([".idx", ".bin"]),
        high=st.booleans(),
    )(check_random_damage)
    settings(max_examples=examples, deadline=None, derandomize=True)(check)()


def check_random_damage(
    prefix: str,
    dtype: str,
    lengths: list[int],
    header: list[int],
    cut: int | None,
    which: str,
    high: bool,
) -> None:
    """Several header bits at once and a cut; tokens of the type's upper half included."""
    top = np.iinfo(dtype).max
    tokens = [(top - place if high else place % 100) for place in range(sum(lengths))]
    with TokenWriter(prefix, dtype) as writer:
        writer.add_many(np.array(tokens, dtype=dtype), lengths)
    for bit in header:
        rewrite(prefix + ".idx", lambda content, bit=bit: flip(bytes(content), bit))
    if cut is not None:
        rewrite(prefix + which, lambda content: content[:cut])
    try:
        read = use(prefix)
    except DataError:
        return
    assert read == tokens


def test_any_flipped_bit_behind_the_header_is_found_or_harmless(dataset: MakeDataset) -> None:
    """``verify_index`` finds each; without it a run meets a DataError at worst."""
    prefix = dataset("a", LENGTHS)
    whole = Path(prefix + ".idx").read_bytes()
    found_at_open = 0
    for bit in range(34 * 8, len(whole) * 8):
        Path(prefix + ".idx").write_bytes(flip(whole, bit))
        try:
            reader = TokenReader(prefix)
        except DataError:
            found_at_open += 1
            continue
        with pytest.raises(DataError):
            reader.verify_index(block=3)
        with contextlib.suppress(DataError):
            use(prefix)
    assert found_at_open > 500


def test_damage_between_the_sampled_documents_never_escapes(tmp_path: Path) -> None:
    prefix = str(tmp_path / "a")
    with TokenWriter(prefix, "uint16") as writer:
        writer.add_many(np.arange(4000) % 1000, [4] * 1000)
    whole = Path(prefix + ".idx").read_bytes()
    values = np.random.default_rng(0)
    opened = 0
    for document in range(1, 1000, 7):
        for value in (-1, 2**62, int(values.integers(-(2**40), 2**40)), 3):
            broken = bytearray(whole)
            struct.pack_into("<q", broken, 34 + 4000 + 8 * document, value)
            Path(prefix + ".idx").write_bytes(broken)
            try:
                reader = TokenReader(prefix)
            except DataError:
                continue
            opened += 1
            with pytest.raises(DataError):
                reader.verify_index()
            try:
                domain = open_domain("d", [prefix], seq_length=64, seed=0, split=("7,3", "valid"))
                for index in range(domain.num_windows(0)):
                    domain.document_starts(0, index)
            except DataError:
                pass
    assert opened > 100


def test_swapped_pairs_are_refused(dataset: MakeDataset) -> None:
    one, two = dataset("one", [4, 5]), dataset("two", [4, 5, 6])
    shutil.move(one + ".bin", one + ".keep")
    shutil.move(two + ".bin", one + ".bin")
    shutil.move(one + ".keep", two + ".bin")
    for prefix in (one, two):
        with pytest.raises(DataError, match="not the file of this index"):
            TokenReader(prefix)


@pytest.mark.parametrize(
    ("wrote", "code"), [("uint16", 4), ("int32", 8), ("int32", 5), ("uint8", 8)]
)
def test_a_wrong_type_code_is_refused(dataset: MakeDataset, wrote: str, code: int) -> None:
    prefix = dataset("a", [3] * 50, dtype=wrote, modulo=200)
    rewrite(prefix + ".idx", lambda content: content.__setitem__(17, code))
    with pytest.raises(DataError, match=r"damaged|not the file"):
        TokenReader(prefix)


def test_a_wrong_type_code_is_found_among_empty_documents(dataset: MakeDataset) -> None:
    """The ends and nearly every document are empty, so only the binary search can tell."""
    lengths = [0] * 50_000
    lengths[23_457] = 7
    prefix = dataset("a", lengths)
    rewrite(prefix + ".idx", lambda content: content.__setitem__(17, 4))
    with pytest.raises(DataError, match="token type"):
        TokenReader(prefix)


@pytest.mark.parametrize("code", [6, 7])
def test_floats_are_not_tokens(dataset: MakeDataset, code: int) -> None:
    prefix = dataset("a", [3, 4], dtype="int32")
    rewrite(prefix + ".idx", lambda content: content.__setitem__(17, code))
    with pytest.raises(DataError, match="floating-point"):
        TokenReader(prefix)


FOREIGN = {
    "legacy": (b"TNTIDX\0\0" + b"\0" * 100, "version 0"),
    "parquet": (b"PAR1" + b"\0" * 200, "not a dataset index"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 200, "not a dataset index"),
    "text": (b'{"text": "hello"}\n' * 10, "not a dataset index"),
    "empty": (b"", "empty file"),
    "short": (b"MMIDIDX\0\0\x01", "truncated"),
    "newer": (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 1) + b"\0" * 8, "version 2"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_indices_are_refused(dataset: MakeDataset, kind: str) -> None:
    prefix = dataset("a", [3, 4])
    content, message = FOREIGN[kind]
    Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        TokenReader(prefix)


def test_directories_fifos_and_unreadable_files(dataset: MakeDataset, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        prefix = dataset("a" + suffix[1:], [3, 4])
        os.remove(prefix + suffix)
        os.mkdir(prefix + suffix)
        with pytest.raises(DataError, match="directory"):
            TokenReader(prefix)
    prefix = dataset("c", [3, 4])
    os.remove(prefix + ".bin")
    os.symlink(prefix + ".bin", prefix + ".bin")
    with pytest.raises(DataError, match="cannot be opened"):
        TokenReader(prefix)


def test_missing_files_name_the_nearest(dataset: MakeDataset, tmp_path: Path) -> None:
    prefix = dataset("code_text_document", [3, 4])
    with pytest.raises(DataError, match=r"did you mean '.*code_text_document'"):
        TokenReader(str(tmp_path / "code_txt_document"))
    with pytest.raises(DataError, match=r"without \.bin"):
        TokenReader(prefix + ".bin")
    with pytest.raises(DataError, match="folder"):
        TokenReader(str(tmp_path / "nowhere" / "a"))


def test_pointers_out_of_order_are_found_by_the_cheap_check(dataset: MakeDataset) -> None:
    prefix = dataset("a", [3] * 20)
    whole = Path(prefix + ".idx").read_bytes()
    for document in range(20):
        broken = bytearray(whole)
        struct.pack_into("<q", broken, 34 + 80 + 8 * document, 6 * (19 - document) + 2)
        Path(prefix + ".idx").write_bytes(broken)
        with pytest.raises(DataError):
            TokenReader(prefix)


def test_an_index_merged_by_old_tools_is_read(dataset: MakeDataset) -> None:
    """They leave doc_idx = [0]; nothing but doc_idx is wrong with such a file."""
    prefix = dataset("a", [3, 4])
    rewrite(
        prefix + ".idx",
        lambda content: content[:26] + struct.pack("<Q", 1) + content[34 : 34 + 24 + 8],
    )
    reader = TokenReader(prefix)
    reader.verify_index()
    assert reader.num_documents == 2


def test_a_file_that_shrinks_under_the_reader(dataset: MakeDataset) -> None:
    prefix = dataset("a", [300, 400])
    reader = TokenReader(prefix)
    os.truncate(prefix + ".bin", 600)
    assert reader.read(0, 300).tolist() == list(range(300))
    with pytest.raises(DataError, match="shrank"):
        reader.read(290, 310)


def test_negative_ids_of_a_narrow_signed_type(dataset: MakeDataset) -> None:
    """int16 and uint16 have the same size: only the values tell a damaged type code."""
    prefix = dataset("a", [4, 4], first=40000)
    rewrite(prefix + ".idx", lambda content: content.__setitem__(17, 3))
    reader = TokenReader(prefix)
    with pytest.raises(DataError, match="negative"):
        reader.read(0, 8)


def test_a_domain_names_itself_in_errors(dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"domain 'code': .*no such file"):
        open_domain("code", [tmp_path / "x"], seq_length=4, seed=0)
    prefix = dataset("a", [3, 1])
    with pytest.raises(DataError, match=r"domain 'code' has no window of .* 5 tokens.*4 tokens"):
        open_domain("code", [prefix], seq_length=4, seed=0)
    with pytest.raises(DataError, match="no window"):
        open_domain("code", [dataset("none", [])], seq_length=4, seed=0)
    with pytest.raises(DataError, match="twice"):
        open_domain("code", [prefix, prefix], seq_length=2, seed=0)
