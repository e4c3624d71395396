"""Verifying, merging, comparing, printing datasets; and megatron-core reading them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_files import ROOT, sha, write_jsonl

from megatron.data.ingest import overlap as overlap_module
from megatron.data.ingest.overlap import NGRAM, overlap
from megatron.data.ingest.verify import verify_dataset
from megatron.data.reader import TokenReader
from megatron.data.sidecar import read_sidecar
from megatron.data.writer import TokenWriter
from megatron.errors import run_command
from tools import inspect_dataset, merge_datasets, train_tokenizer


@pytest.fixture
def dataset(preprocess, corpus, tmp_path) -> Path:
    preprocess("--input", corpus, "--append-eod", "--output-prefix", tmp_path / "d")
    return tmp_path / "d_text_document"


@pytest.fixture
def tool(capsys):
    def run(module, *arguments, code=0):
        found = run_command(lambda: module.main([str(a) for a in arguments]))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return out + err

    return run


def write(prefix, documents, dtype="<u2"):
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.asarray(document, dtype=dtype))
    return str(prefix)


# -- inspect ---------------------------------------------------------------------------------


def test_summary_and_documents(tool, dataset, tokenizer_file, docs):
    out = tool(inspect_dataset, dataset)
    assert f"documents       {len(docs)}" in out
    assert "HFTokenizer, 700 ids, ends with token" in out
    out = tool(inspect_dataset, f"{dataset}.bin", "--documents", "0", "-3", "--vocab-file",
               tokenizer_file, "--tokens", "0")  # fmt: skip
    assert docs[0] in out
    assert docs[-3].strip() in out
    ids = tool(inspect_dataset, dataset, "--documents", "1", "--tokens", "4").splitlines()
    assert "first 4" in ids[-2]
    assert len(ids[-1].split()) == 4
    assert "has documents 0 to" in tool(inspect_dataset, dataset, "--documents", 999, code=2)


def test_verify_says_sound(tool, dataset):
    out = tool(inspect_dataset, dataset, "--verify")
    assert "sound" in out
    assert "SHA-256 of d_text_document.bin" in out


def test_verify_finds_any_flipped_bit(dataset):
    """R8: payload flips, 100 % found; nothing but the bit decides."""
    rng = random.Random(0)
    for trial in range(60):
        path = Path(f"{dataset}{'.bin' if trial % 2 else '.idx'}")
        content = bytearray(path.read_bytes())
        bit = rng.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        good = path.read_bytes()
        path.write_bytes(content)
        problems = verify_dataset(str(dataset)).problems
        path.write_bytes(good)
        assert problems, f"bit {bit} of {path.name}"
        assert all(str(dataset) in problem for problem in problems)
    assert not verify_dataset(str(dataset)).problems


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "swapped"])
def test_verify_names_what_is_wrong(change, suffix, dataset, tool, tmp_path):
    path = Path(f"{dataset}{suffix}")
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "swapped":
        other = write(tmp_path / "other", [[1, 2, 3], [4]])
        shutil.copy(f"{other}{suffix}", path)
    else:
        path.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    out = tool(inspect_dataset, dataset, "--verify", code=2)
    assert "error:" in out
    assert "d_text_document" in out


def test_verify_without_a_sidecar_says_what_it_could_not_check(dataset, tool):
    Path(f"{dataset}.meta.json").unlink()
    assert "no checksums" in tool(inspect_dataset, dataset, "--verify")


def test_verify_finds_an_end_that_the_sidecar_does_not_tell(dataset):
    path = Path(f"{dataset}.meta.json")
    path.write_text(path.read_text().replace('"eod_id": 0', '"eod_id": 5'))
    assert "document" in verify_dataset(str(dataset)).problems[0]


# -- merge -----------------------------------------------------------------------------------


def test_merge_joins_files_and_sidecars(tool, preprocess, tmp_path, docs):
    folder = tmp_path / "parts"
    for name, part in (("a", docs[:5]), ("b", docs[5:]), ("all", docs)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": doc} for doc in part])
        where = tmp_path if name == "all" else folder
        preprocess("--input", path, "--append-eod", "--output-prefix", where / name)
    tool(merge_datasets, "--input", folder, "--output-prefix", tmp_path / "m")
    assert sha(tmp_path / "m") == sha(tmp_path / "all_text_document")
    assert read_sidecar(tmp_path / "m") == read_sidecar(tmp_path / "all_text_document")
    listed = [folder / "a_text_document", folder / "b_text_document"]
    out = tool(merge_datasets, "--input", *listed, "--output-prefix", tmp_path / "m", code=2)
    assert "--overwrite" in out
    tool(merge_datasets, "--input", *reversed(listed), "--output-prefix", tmp_path / "n")
    assert sha(tmp_path / "n") != sha(tmp_path / "m")
    assert not verify_dataset(str(tmp_path / "n")).problems


def test_merge_refuses_what_does_not_fit(tool, tmp_path, dataset):
    write(tmp_path / "wide", [[1, 70000]], "<i4")
    write(tmp_path / "bare", [[1, 2]])
    given = ("--output-prefix", tmp_path / "m", "--input")
    out = tool(merge_datasets, *given, dataset, tmp_path / "wide", code=2)
    assert "int32" in out
    assert "uint16" in out
    assert "no such file" in tool(merge_datasets, *given, tmp_path / "none", code=2)
    out = tool(merge_datasets, *given, dataset, tmp_path / "bare")
    assert "no sidecar written, because" in out
    assert read_sidecar(tmp_path / "m") is None
    (tmp_path / "f").mkdir()
    assert "no .bin/.idx pair" in tool(merge_datasets, *given, tmp_path / "f", code=2)
    (tmp_path / "f" / "x.bin").write_bytes(b"")
    assert "x.idx: missing beside its partner" in tool(
        merge_datasets, *given, tmp_path / "f", code=2
    )


def test_merge_refuses_other_tokenizers(tool, tmp_path, preprocess, corpus, dataset):
    preprocess("--input", corpus, "--output-prefix", tmp_path / "c", "--tokenizer-type",
               "CharLevelTokenizer", tokenizer=False)  # fmt: skip
    out = tool(merge_datasets, "--input", dataset, tmp_path / "c_text_document",
               "--output-prefix", tmp_path / "m", code=2)  # fmt: skip
    assert "different tokenizers" in out


# -- overlap ---------------------------------------------------------------------------------


def by_hand(a, b, threshold):
    """Count the same by sets."""
    whole = {tuple(d) for d in a}
    stream = [t for d in a for t in d]
    grams = {tuple(stream[i : i + NGRAM]) for i in range(len(stream) - NGRAM + 1)}
    exact = similar = touched = 0
    for d in b:
        own = [tuple(d[i : i + NGRAM]) for i in range(len(d) - NGRAM + 1)]
        share = sum(g in grams for g in own) / len(own) if own else -1
        is_exact = tuple(d) in whole
        exact += is_exact
        similar += is_exact or share >= threshold
        touched += is_exact or share > 0
    return exact, similar, touched


documents = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=8)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(documents, documents, st.lists(st.integers(0, 7), max_size=3))
def test_overlap_equals_counting_by_sets(tmp_path_factory, a, b, copied):
    b = b + [a[i % len(a)] for i in copied]
    folder = tmp_path_factory.mktemp("o")
    found = overlap([write(folder / "a", a)], [write(folder / "b", b)])
    assert (found.exact, found.similar, found.touched) == by_hand(a, b, 0.8)
    assert found.documents == found.of == len(b)


def test_overlap_of_parts_of_one_dataset_and_by_the_tool(dataset, tool, docs):
    with TokenReader(dataset) as reader:
        half = reader.num_documents // 2
        found = overlap([(reader, 0, half)], [(reader, half - 1, half + 1)])
        assert (found.documents, found.exact) == (2, 1)
        whole = overlap([(reader, 0, reader.num_documents)], [(reader, 0, half)], max_documents=3)
        assert whole.documents in (3, 4)
        assert whole.exact == whole.documents
    out = tool(inspect_dataset, "--overlap", dataset, dataset)
    assert f"found exactly: {len(docs)} (100.00 %)" in out


def test_overlap_of_a_part_of_a_says_so(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    a = write(tmp_path / "a", [rng.integers(0, 60000, 500) for _ in range(400)])
    monkeypatch.setattr(overlap_module, "_BATCH_TOKENS", 5000)
    with TokenReader(a) as reader:
        found = overlap([a], [(reader, 0, reader.num_documents)], max_scan_tokens=50_000)
    assert 0.15 < found.scanned < 0.35
    assert abs(found.share(found.exact) - found.scanned) < 0.05
    assert "lower bounds" in found.lines()[0]


def test_overlap_refuses_other_tokenizers(tool, preprocess, corpus, tmp_path, dataset):
    preprocess("--input", corpus, "--output-prefix", tmp_path / "c", "--tokenizer-type",
               "CharLevelTokenizer", tokenizer=False)  # fmt: skip
    out = tool(inspect_dataset, "--overlap", dataset, tmp_path / "c_text_document", code=2)
    assert "different tokenizers" in out


# -- tokenizer training ----------------------------------------------------------------------


def test_train_tokenizer(tool, corpus, tmp_path, preprocess):
    out = tool(train_tokenizer, "--input", corpus, "--output", tmp_path / "t.json", "-v", "400")
    assert "400 ids" in out
    preprocess("--input", corpus, "--tokenizer-type", "HFTokenizer", "--vocab-file",
               tmp_path / "t.json", "--output-prefix", tmp_path / "o", tokenizer=False)  # fmt: skip
    assert "is a .json file" in tool(
        train_tokenizer, "--input", corpus, "--output", tmp_path / "t", code=2
    )
    assert "no such file" in tool(
        train_tokenizer, "--input", "none.jsonl", "--output", tmp_path / "t.json", code=2
    )


# -- megatron-core ---------------------------------------------------------------------------


def core():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.filterwarnings("ignore")
def test_megatron_core_reads_what_is_written_here(dataset):
    theirs = core().IndexedDataset(str(dataset))
    with TokenReader(dataset) as ours:
        assert len(theirs) == ours.num_documents
        assert theirs.document_indices.tolist() == list(range(ours.num_documents + 1))
        for i in range(ours.num_documents):
            expected = ours.read(ours.document_start(i), ours.document_start(i + 1))
            assert theirs[i].dtype == expected.dtype
            np.testing.assert_array_equal(theirs[i], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_core_writes_is_read_here(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    builder = core().IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=dtype)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, n) for n in (5, 1, 300, 17)]
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "c.idx"))
    with TokenReader(tmp_path / "c") as ours:
        assert ours.dtype == np.dtype(dtype)
        for i, document in enumerate(documents):
            read = ours.read(ours.document_start(i), ours.document_start(i + 1))
            np.testing.assert_array_equal(read, document)
    assert not verify_dataset(str(tmp_path / "c")).problems


def test_both_megatrons_are_imported_in_one_process():
    core()
    code = (
        "import megatron.data.reader, megatron.tokenizer, megatron.core\n"
        "from megatron.core.datasets.indexed_dataset import IndexedDataset\n"
        "from megatron.data.writer import TokenWriter\n"
        "print(len({megatron.core.__file__, megatron.data.reader.__file__}))"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "2"
