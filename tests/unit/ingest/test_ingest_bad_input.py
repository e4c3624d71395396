"""What a user can get wrong: one clear message, exit code 2, nothing that looks complete."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
import zstandard
from ingest_files import ROOT, sha, write_jsonl

GOOD = '{"text": "good"}\n'


def bad(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content) and folder / name


CASES = {
    "empty jsonl": (lambda f: (f / "x.jsonl").write_bytes(b"") or f / "x.jsonl",
                    ["x.jsonl", "no documents", "'text'"]),
    "blank jsonl": (bad("x.jsonl", b"\n \n\n"), ["x.jsonl", "no documents"]),
    "only empty documents": (bad("x.jsonl", b'{"text": ""}\n'), ["no documents", "1 empty"]),
    "invalid utf-8": (bad("x.jsonl", (GOOD * 2).encode() + b'{"text": "\xff"}\n'),
                      ["x.jsonl, line 3", "invalid UTF-8", "0xff"]),
    "bad json": (bad("x.jsonl", (GOOD + "\n{oops}\n").encode()),
                 ["x.jsonl, line 3", "not JSON", "{oops}"]),
    "json array": (bad("x.json", json.dumps([{"text": "a"}]).encode()),
                   ["x.json, line 1", "a list, not a JSON object"]),
    "a number": (bad("x.jsonl", b"17\n"), ["line 1", "a number"]),
    "deep json": (bad("x.jsonl", b"[" * 100_000 + b"\n"), ["line 1", "JSON"]),
    "missing key": (bad("x.jsonl", (GOOD + '{"txet": "a", "id": 3}\n').encode()),
                    ["line 2", "no key 'text'", "did you mean 'txet'", "--jsonl-keys"]),
    "null": (bad("x.jsonl", b'{"text": null}\n'), ["line 1", "'text' is null"]),
    "not text": (bad("x.jsonl", b'{"text": {"a": 1}}\n'), ["line 1", "'text' is an object"]),
    "half a surrogate": (bad("x.jsonl", b'{"text": "a\\ud83d"}\n'),
                         ["line 1", "surrogate", "\\ud83d", "--ftfy"]),
    "truncated gz": (bad("x.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-9]),
                     ["x.jsonl.gz", "truncated"]),
    "truncated zst": (bad("x.jsonl.zst", zstandard.compress(GOOD.encode() * 500)[:-3]),
                      ["x.jsonl.zst", "truncated"]),
    "not gz": (bad("x.jsonl.gz", b"plain"), ["x.jsonl.gz", "damaged, or not what its name says"]),
    "unknown extension": (bad("x.docx", b"x"), ["x.docx", "unknown format (.docx)", ".parquet"]),
    "no extension": (bad("x", b"x"), ["unknown format (no extension)"]),
    "bad parquet": (bad("x.parquet", b"PAR1 no"), ["x.parquet", "not a readable Parquet"]),
    "empty folder": (lambda f: (f / "d").mkdir() or f / "d", ["holds no file of a known format"]),
    "missing": (lambda f: f / "corpis.jsonl", ["no such file or folder"]),
    "near miss": (lambda f: (bad("corpus.jsonl", b"x")(f), f / "corpis.jsonl")[1],
                  ["did you mean", "corpus.jsonl"]),
    "no match": (lambda f: f / "*.jsonl", ["no file matches"]),
    "utf-16 text": (bad("x.txt", "abc".encode("utf-16")), ["x.txt, line 1", "invalid UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_message(name, preprocess, tmp_path):
    make, parts = CASES[name]
    path = make(tmp_path)
    out = preprocess("--input", path, "--output-prefix", tmp_path / "out" / "o", code=2)
    assert out.count("error:") == 1
    for part in parts:
        assert part in out, out
    assert not list(tmp_path.glob("out/*.idx"))
    assert not list(tmp_path.glob("out/*.meta.json"))


def test_compressed_input_counts_its_lines_too(preprocess, tmp_path, monkeypatch):
    from megatron.data.ingest import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50)
    content = GOOD * 9 + "{oops}\n" + GOOD
    (tmp_path / "x.jsonl").write_text(content)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("x.jsonl", "x.jsonl.gz"):
        out = preprocess("--input", tmp_path / name, "--output-prefix", tmp_path / name, code=2)
        assert f"{name}, line 10: not JSON" in out


def test_parquet_lacks_a_column_or_holds_a_null(preprocess, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"content": ["a", None], "n": [1, 2]}), tmp_path / "p.parquet")
    given = ("--input", tmp_path / "p.parquet", "--output-prefix", tmp_path / "p")
    out = preprocess(*given, code=2)
    assert "no column 'text'" in out
    assert "content, n" in out
    out = preprocess(*given, "--jsonl-keys", "content", code=2)
    assert "row 2: 'content' is null" in out
    out = preprocess(*given, "--jsonl-keys", "n", code=2)
    assert "row 1: 'n' is a number, not text" in out


def test_a_saved_dict_of_splits_names_its_splits(preprocess, tmp_path):
    import datasets

    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "d")
    out = preprocess("--input", tmp_path / "d", "--output-prefix", tmp_path / "o", code=2)
    assert "test, train" in out
    preprocess("--input", tmp_path / "d" / "train", "--output-prefix", tmp_path / "o")


def test_bad_records_may_be_left_out_and_are_counted(preprocess, tmp_path):
    content = (
        GOOD.encode() * 3 + b"{oops}\n" + b'{"text": "\xff"}\n' + b'{"x": 1}\n' + GOOD.encode()
    )
    (tmp_path / "x.jsonl").write_bytes(content)
    given = ("--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "o")
    assert "--bad-records skip" in preprocess(*given, code=2)
    out = preprocess(*given, "--bad-records", "skip")
    assert "4 documents" in out
    assert "3 unusable records left out" in out
    assert "line 4: not JSON" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--vocab-file", "no/such.json"], "no/such.json: no such file"),
        ([], "--vocab-file"),
    ],
)
def test_a_missing_tokenizer_file(arguments, part, preprocess, corpus, tmp_path):
    out = preprocess("--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer-type",
                     "HFTokenizer", *arguments, tokenizer=False, code=2)  # fmt: skip
    assert part in out


@pytest.mark.parametrize(
    ("library", "name"), [("zstandard", "x.jsonl.zst"), ("pyarrow.parquet", "x.parquet")]
)
def test_a_missing_library_names_its_extra(library, name, preprocess, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(zstandard.compress(GOOD.encode()))
    monkeypatch.setitem(sys.modules, library, None)
    out = preprocess("--input", tmp_path / name, "--output-prefix", tmp_path / "o", code=2)
    assert "neomix[train]" in out


def test_keys_of_plain_text_and_doubled_keys(preprocess, tmp_path):
    (tmp_path / "x.txt").write_text("a")
    given = ("--input", tmp_path / "x.txt", "--output-prefix", tmp_path / "o")
    assert "has no fields" in preprocess(*given, "--jsonl-keys", "a", "b", code=2)
    assert "named twice" in preprocess(*given, "--jsonl-keys", "a", "a", code=2)


def test_an_output_that_cannot_be_written(preprocess, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    out = preprocess("--input", corpus, "--output-prefix", tmp_path / "file" / "o", code=2)
    assert "cannot be written" in out


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    preprocess, corpus, tmp_path, monkeypatch
):
    from megatron.data import writer
    from megatron.data.ingest import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    preprocess("--input", corpus, "--output-prefix", tmp_path / "a")
    real = writer.TokenWriter.add_many
    calls = []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 4:
            with writer._disk_errors(self.prefix):
                raise OSError(28, "No space left on device", self._bin_tmp)
        real(self, *arguments)

    monkeypatch.setattr(writer.TokenWriter, "add_many", full)
    given = ("--input", corpus, "--output-prefix", tmp_path / "b", "--save-seconds", "0")
    out = preprocess(*given, code=2)
    assert "No space left on device" in out
    assert "b_text_document.bin.tmp" in out
    assert not (tmp_path / "b_text_document.idx").exists()
    monkeypatch.setattr(writer.TokenWriter, "add_many", real)
    assert "continuing" in preprocess(*given)
    assert sha(tmp_path / "a_text_document") == sha(tmp_path / "b_text_document")


def test_the_command_itself_exits_2_without_a_traceback(tmp_path, tokenizer_file):
    path = write_jsonl(tmp_path / "x.jsonl", [{"txt": "a"}])
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", path, "--tokenizer-type",
         "HFTokenizer", "--vocab-file", tokenizer_file, "--output-prefix", tmp_path / "o",
         "--workers", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert f"{path}, line 1: no key 'text'" in ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
