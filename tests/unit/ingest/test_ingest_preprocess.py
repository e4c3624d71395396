"""What preprocess_data.py writes, from every format, with any number of workers."""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_files import FORMATS, sha, write_jsonl, written

from megatron.data.ingest import chunks
from megatron.data.ingest.chunks import read_chunks
from megatron.data.ingest.records import read_records
from megatron.data.ingest.sources import find_sources
from megatron.data.reader import TokenReader
from megatron.data.sidecar import read_sidecar
from megatron.tokenizer import build_tokenizer


def tokens(prefix) -> list[list[int]]:
    with TokenReader(f"{prefix}_text_document") as reader:
        starts = [reader.document_start(i) for i in range(reader.num_documents + 1)]
        return [reader.read(a, b).tolist() for a, b in itertools.pairwise(starts)]


def test_documents_come_out_in_order_each_with_its_end(preprocess, corpus, tmp_path, docs,
                                                       tokenizer_file):  # fmt: skip
    out = preprocess("--input", corpus, "--append-eod", "--output-prefix", tmp_path / "a")
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    expected = [[*tokenizer.encode(doc), tokenizer.eod] for doc in docs]
    assert tokens(tmp_path / "a") == expected
    assert f"{len(docs)} documents" in out
    sidecar = read_sidecar(tmp_path / "a_text_document")
    assert sidecar.documents == len(docs)
    assert sidecar.bytes == sum(len(doc.encode()) for doc in docs)
    assert (sidecar.append_eod, sidecar.eod_id) == (True, tokenizer.eod)
    assert (sidecar.dtype, sidecar.vocab_size) == ("uint16", 700)
    assert sidecar.tokenizer == {"type": "HFTokenizer", "sha256": tokenizer.sha256}
    assert (sidecar.bin.sha256, sidecar.idx.sha256) == sha(tmp_path / "a_text_document")


def test_a_large_vocabulary_takes_int32(preprocess, corpus, tmp_path, docs):
    import base64

    ranks = [bytes((b,)) for b in range(256)]
    ranks += [b"zz%06d" % i for i in range(65500 - 256)]
    (tmp_path / "big.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))
    )
    kind = ("--tokenizer-type", "TiktokenTokenizer", "--vocab-file", tmp_path / "big.tiktoken")
    preprocess("--input", corpus, "--output-prefix", tmp_path / "a", *kind, tokenizer=False)
    with TokenReader(tmp_path / "a_text_document") as reader:
        assert reader.dtype == np.dtype("<i4")
        assert reader.num_documents == len(docs)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_files(name, preprocess, corpus, tmp_path, docs, monkeypatch):
    preprocess("--input", corpus, "--append-eod", "--output-prefix", tmp_path / "a")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    path = written(tmp_path, name, docs)
    preprocess("--input", path, "--append-eod", "--output-prefix", tmp_path / "b")
    assert sha(tmp_path / "b_text_document") == sha(tmp_path / "a_text_document")


@pytest.mark.parametrize("name", [*FORMATS, "txt"])
def test_chunks_from_any_cut_are_the_rest(name, tmp_path, docs, monkeypatch):
    """Reading on from a chunk's end, even with other chunk sizes, loses and repeats nothing."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)
    path = written(tmp_path, name, docs)
    (source,) = find_sources([str(path)], text_documents="line")

    def texts(start):
        return [
            record.texts
            for chunk in read_chunks(source, 0, start, ("text",))
            for record in read_records(chunk, ("text",))
        ]

    whole = texts(0)
    before = 0
    for chunk in list(read_chunks(source, 0, 0, ("text",))):
        before += len(list(read_records(chunk, ("text",))))
        assert texts(chunk.stop) == whole[before:]
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 1700)
        assert texts(chunk.stop) == whole[before:]
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)


@pytest.mark.parametrize("name", ["jsonl", "jsonl.zst", "parquet"])
def test_workers_change_nothing(name, preprocess, tmp_path, docs, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1500)
    path = written(tmp_path, name, docs)
    for workers in (1, 3):
        preprocess("--input", path, "--append-eod", "--output-prefix", tmp_path / f"w{workers}",
                   "--workers", workers)  # fmt: skip
    assert sha(tmp_path / "w1_text_document") == sha(tmp_path / "w3_text_document")


def test_several_keys_are_really_read(preprocess, tmp_path, tokenizer_file):
    path = write_jsonl(
        tmp_path / "k.jsonl", [{"title": f"t{i}", "body": f"b {i}"} for i in range(5)]
    )
    preprocess("--input", path, "--jsonl-keys", "title", "body", "--output-prefix", tmp_path / "k")
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    for key, form in (("title", "t{}"), ("body", "b {}")):
        with TokenReader(tmp_path / f"k_{key}_document") as reader:
            got = reader.read(0, reader.num_tokens).tolist()
        assert got == [t for i in range(5) for t in tokenizer.encode(form.format(i))]


@pytest.mark.parametrize("eod", [(), ("--append-eod",)])
def test_empty_documents_are_left_out_and_counted(eod, preprocess, tmp_path, tokenizer_file):
    path = write_jsonl(tmp_path / "e.jsonl", [{"text": t} for t in ("", "a", "", "b", " ")])
    out = preprocess("--input", path, *eod, "--output-prefix", tmp_path / "e")
    assert "3 documents" in out
    assert "2 empty left out" in out
    assert [t[0] for t in tokens(tmp_path / "e")] == [
        build_tokenizer("HFTokenizer", tokenizer_file).encode(t)[0] for t in ("a", "b", " ")
    ]


def test_inputs_by_list_glob_folder_and_repetition(preprocess, tmp_path, docs):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for i in range(4):
        target = folder if i % 2 else tmp_path / "in"
        write_jsonl(target / f"{i}.jsonl", [{"text": docs[i]}])
    (tmp_path / "in" / "notes.md").write_text("not an input")
    a, b, c, d = (
        tmp_path / "in" / f for f in ("0.jsonl", "2.jsonl", "deep/1.jsonl", "deep/3.jsonl")
    )
    ways = {
        "comma": ["--input", f"{a},{b}, {c},{d}"],
        "several": ["--input", a, b, "--input", c, d],
        "folder": ["--input", tmp_path / "in"],
        "glob": ["--input", tmp_path / "in" / "*.jsonl", tmp_path / "in" / "*" / "*.jsonl"],
    }
    found = set()
    for name, way in ways.items():
        preprocess(*way, "--output-prefix", tmp_path / name)
        found.add(sha(tmp_path / f"{name}_text_document"))
    assert len(found) == 1


def test_plain_text_by_file_or_line(preprocess, tmp_path, tokenizer_file):
    (tmp_path / "p.txt").write_text("one\n\ntwo lines\n")
    with gzip.open(tmp_path / "p.txt.gz", "wb") as file:
        file.write(b"one\n\ntwo lines\n")
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    for path in ("p.txt", "p.txt.gz"):
        for mode, expected in (("file", ["one\n\ntwo lines\n"]), ("line", ["one", "two lines"])):
            preprocess("--input", tmp_path / path, "--text-documents", mode, "--overwrite",
                       "--output-prefix", tmp_path / "p")  # fmt: skip
            assert tokens(tmp_path / "p") == [tokenizer.encode(t) for t in expected]


def test_odd_but_good_json_lines(preprocess, tmp_path, tokenizer_file):
    lines = [
        '\ufeff{"text": "a byte order mark"}',
        "",
        '  {"text": "spaces"}  \r',
        '"a bare string"',
        '{"text": ["a", "list"]}',
        '{"text": "line\u2028separators\u0085stay \\ud83d\\ude00"}',
    ]
    (tmp_path / "o.jsonl").write_text("\n".join(lines), encoding="utf-8")  # no newline at the end
    preprocess("--input", tmp_path / "o.jsonl", "--output-prefix", tmp_path / "o")
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    texts = ["a byte order mark", "spaces", "a bare string", "a\n\nlist",
             "line\u2028separators\u0085stay \U0001f600"]  # fmt: skip
    assert tokens(tmp_path / "o") == [tokenizer.encode(t) for t in texts]


def test_ftfy_repairs(preprocess, tmp_path, tokenizer_file):
    ftfy = pytest.importorskip("ftfy")
    texts = ["schÃ¶n", "\ud83dlone", "plain"]
    path = write_jsonl(tmp_path / "f.jsonl", [{"text": t} for t in texts])
    preprocess(
        "--input", path, "--ftfy", "--bad-records", "skip", "--output-prefix", tmp_path / "f"
    )
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    assert tokens(tmp_path / "f") == [tokenizer.encode(ftfy.fix_text(t)) for t in texts]


def test_the_slow_encoder_gives_the_same_files(preprocess, corpus, tmp_path):
    for encoder in ("auto", "tokenizers"):
        out = preprocess("--input", corpus, "--append-eod", "--encoder", encoder,
                         "--output-prefix", tmp_path / encoder)  # fmt: skip
        assert ("fast" in out) == (encoder == "auto")
    assert sha(tmp_path / "auto_text_document") == sha(tmp_path / "tokenizers_text_document")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    st.integers(1, 200),
)
def test_any_texts_survive_the_cut_into_chunks(tmp_path_factory, texts, size):
    path = write_jsonl(tmp_path_factory.mktemp("h") / "h.jsonl", [{"text": text} for text in texts])
    (source,) = find_sources([str(path)])
    old, chunks.CHUNK_BYTES = chunks.CHUNK_BYTES, size
    try:
        found = [
            record.texts[0]
            for chunk in read_chunks(source, 0, 0, ("text",))
            for record in read_records(chunk, ("text",))
        ]
    finally:
        chunks.CHUNK_BYTES = old
    assert found == texts
