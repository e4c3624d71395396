"""GPT-NeoX's older format: the same documents as in the new one, and what is wrong with a file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.config.data import DataConfig, DomainConfig
from megatron.data.domain import open_domain
from megatron.data.ingest.merging import merge_datasets
from megatron.data.reader import TokenReader
from megatron.data.writer import TokenWriter
from megatron.errors import DataError
from megatron.training.domains import open_domains

SEQ = 16


def write_legacy(prefix: Path, documents: list[np.ndarray], dtype: str = "<i4") -> str:
    """Write documents as GPT-NeoX's ``cached`` builder does."""
    sizes = [len(document) for document in documents]
    code = {"<u2": 8, "<i4": 4}[dtype]
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    numbers = [
        list(range(len(sizes) + 1)),
        [0, *np.cumsum(sizes).tolist()],
        sizes,
        list(range(len(sizes) + 1)),
    ]
    count = len(sizes)
    header = struct.pack("<8sQQQ", b"TNTIDX\0\0", 1, code, np.dtype(dtype).itemsize)
    header += struct.pack("<QQQ", count, count, count + 1)
    body = b"".join(np.array(part, dtype="<i8").tobytes() for part in numbers)
    Path(f"{prefix}.idx").write_bytes(header + body)
    return str(prefix)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    random = np.random.default_rng(3)
    documents = [random.integers(0, 900, random.integers(0, 60)) for _ in range(150)]
    with TokenWriter(tmp_path / "new", "int32") as writer:
        for document in documents:
            writer.add(document)
    return write_legacy(tmp_path / "old", documents), str(tmp_path / "new")


@pytest.mark.parametrize("how", ["packed", "pack_until_overflow"])
def test_the_same_samples_come_out_of_both(pair: tuple[str, str], how: str) -> None:
    for split in (None, ("80,10,10", "train"), ("80,10,10", "valid")):
        old, new = (
            open_domain("a", [prefix], seq_length=SEQ, seed=1, split=split, pack_impl=how)
            for prefix in pair
        )
        assert old.sources[0].documents == new.sources[0].documents
        assert old.num_windows(0) == new.num_windows(0)
        for sample in range(old.num_windows(0)):
            assert (old.sample(0, sample) == new.sample(0, sample)).all()
            assert (old.document_starts(0, sample) == new.document_starts(0, sample)).all()


def test_every_number_of_the_index_is_read_and_checked(pair: tuple[str, str]) -> None:
    old, new = (TokenReader(prefix) for prefix in pair)
    assert old.legacy
    assert not new.legacy
    old.verify_index()
    for document in range(old.num_documents):
        assert old.document_size(document) == new.document_size(document)
        assert old.document_start(document) == new.document_start(document)
    assert (old.document_sizes(3, 90) == new.document_sizes(3, 90)).all()
    for token in (0, 1, old.num_tokens // 2, old.num_tokens - 1):
        assert old.document_at(token) == new.document_at(token)


def test_merging_writes_the_new_format(pair: tuple[str, str], tmp_path: Path) -> None:
    merge_datasets(list(pair), str(tmp_path / "all"))
    with TokenReader(tmp_path / "all") as merged, TokenReader(pair[1]) as one:
        assert not merged.legacy
        assert merged.num_documents == 2 * one.num_documents
        half = merged.read(0, one.num_tokens)
        assert (half == merged.read(one.num_tokens, merged.num_tokens)).all()


def test_damage_is_told(pair: tuple[str, str]) -> None:
    path = Path(pair[0] + ".idx")
    sound = path.read_bytes()
    for content, said in (
        (sound[:30], "truncated"),
        (sound[:-8], "truncated"),
        (sound[:8] + struct.pack("<Q", 2) + sound[16:], "version 2"),
        (sound[:24] + struct.pack("<Q", 2) + sound[32:], "2 bytes for a int32"),
        (sound[:16] + struct.pack("<Q", 6) + sound[24:], "floating-point"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            TokenReader(pair[0])


@pytest.mark.option("data_impl")
@pytest.mark.parametrize(("impl", "wrong"), [("mmap", 0), ("cached", 1), ("lazy", 1)])
def test_data_impl_says_which_format_there_has_to_be(
    pair: tuple[str, str], impl: str, wrong: int
) -> None:
    def opened(prefix: str) -> None:
        open_domains(
            {"a": DomainConfig(train=prefix)},
            split="80,10,10",
            seq_length=SEQ,
            seed=1,
            reading=DataConfig(data_impl=impl),
        ).close()

    with pytest.raises(DataError, match=f"data_impl is {impl}"):
        opened(pair[wrong])
    opened(pair[1 - wrong])
