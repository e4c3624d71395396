"""Corpora: what is a document, in every format, from any place, and under a name of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.selection import chat, texts, write_lines

from megatron.config.data import DomainConfig
from megatron.data.ingest.pipeline import preprocess
from megatron.data.ingest.records import BadRecordError
from megatron.data.ingest.settings import PreprocessSettings
from megatron.data.reader import TokenReader
from megatron.data.writer import TokenWriter
from megatron.errors import DataError
from megatron.selection.base import Turn
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.inputs import Inputs, open_corpus
from megatron.selection.records import content, own_id
from megatron.tokenizer import build_tokenizer

datasets.disable_progress_bars()


def opened(*words: object, **more: Any) -> DocumentCorpus:
    options = {key: more.pop(key) for key in ("tokenizer", "folder", "say") if key in more}
    return open_corpus(Inputs(words=tuple(map(str, words)), **more), **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 900 records in every format."""
    root = tmp_path_factory.mktemp("corpus")
    # Long enough that a file is several of the stretches that an index tells apart.
    records = [{"id": f"r{n}", "text": f"{n} " * 900} for n in range(900)]
    columns = {key: [record[key] for record in records] for key in ("id", "text")}
    pq.write_table(pa.table(columns), root / "table.parquet", row_group_size=70)
    datasets.Dataset.from_dict(columns).save_to_disk(str(root / "saved"))
    return {
        "jsonl": write_lines(root / "plain.jsonl", records),
        "gz": write_lines(root / "packed.jsonl.gz", records),
        "parquet": root / "table.parquet",
        "dataset": root / "saved",
    }


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "dataset"])
def test_every_format_is_read_from_any_place(files: dict[str, Path], kind: str) -> None:
    corpus = opened(files[kind])
    everything = list(corpus.read())
    assert [one.id for one in everything] == [f"r{n}" for n in range(900)]
    assert [one.number for one in everything] == list(range(900))
    assert everything[7].text == "7 " * 900
    random = np.random.default_rng(1)
    for _ in range(12):
        start, stop = sorted(random.integers(0, 901, 2).tolist())
        assert list(corpus.read(start, stop)) == everything[start:stop]
        assert [row.document for row in corpus.rows(start, stop)] == everything[start:stop]
    assert list(corpus.read(899)) == everything[899:]
    assert list(corpus.read(900)) == []
    assert next(iter(corpus.rows(5, 6))).record == {"id": "r5", "text": "5 " * 900}


def test_reading_from_a_place_parses_nothing_before_it(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = opened(files["jsonl"])
    parsed = []
    from megatron.selection import text_part

    real = text_part.parse_json
    monkeypatch.setattr(text_part, "parse_json", lambda line: parsed.append(1) or real(line))
    assert [one.id for one in corpus.read(880, 883)] == ["r880", "r881", "r882"]
    assert len(parsed) == 3
    assert len(corpus.indexes[0].firsts) > 2


def test_several_inputs_are_one_corpus_and_its_fingerprint_is_theirs(
    files: dict[str, Path], tmp_path: Path
) -> None:
    both = opened(files["jsonl"], files["parquet"])
    assert len(both) == 1800
    assert [one.source for one in both.read(899, 901)] == ["plain", "table"]
    # The same ids in two sources.
    assert [one.id for one in both.read(899, 901)] == ["plain/r899", "table/r0"]
    assert both.fingerprint() == opened(f"{files['jsonl']},{files['parquet']}").fingerprint()
    assert both.fingerprint() != opened(files["parquet"], files["jsonl"]).fingerprint()
    elsewhere = tmp_path / "plain.jsonl"
    elsewhere.write_bytes(files["jsonl"].read_bytes())
    assert opened(elsewhere).fingerprint() == opened(files["jsonl"]).fingerprint()
    elsewhere.write_bytes(files["jsonl"].read_bytes().replace(b"899 899", b"899 898", 1))
    assert opened(elsewhere).fingerprint() != opened(files["jsonl"]).fingerprint()


def test_ids_are_unique_whatever_the_records_say(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "x.jsonl", [{"text": "t"}] * 2)
    same_names = opened(tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl")
    assert [one.id for one in same_names.read()] == ["a/x:0", "a/x:1", "b/x:0", "b/x:1"]
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": 3, "text": "t"}] * 2)
    assert [one.id for one in opened(twice).read()] == ["twice:0", "twice:1"]
    some = write_lines(tmp_path / "some.jsonl", [{"id": 3, "text": "t"}, {"text": "t"}])
    assert [one.id for one in opened(some).read()] == ["3", "some:1"]
    with pytest.raises(DataError, match=r"some\.jsonl is named twice"):
        opened(some, some)


def test_an_index_is_used_again_until_the_file_changes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", texts(50))
    said: list[str] = []
    folder = tmp_path / "index"
    first = opened(path, folder=folder, say=said.append)
    assert said == ["x: 50 documents"]
    again = opened(path, folder=folder, say=said.append)
    assert len(said) == 1
    assert again.fingerprint() == first.fingerprint()
    assert list(again.read(10, 20)) == list(first.read(10, 20))
    write_lines(path, texts(51))
    assert len(opened(path, folder=folder, say=said.append)) == 51
    (part,) = folder.glob("*.npz")
    part.write_bytes(part.read_bytes()[:100])  # torn by a full disk, say
    assert len(opened(path, folder=folder, say=said.append)) == 51
    assert len(said) == 3


def test_a_file_that_changes_under_the_reader_is_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", texts(50))
    corpus = opened(path)
    write_lines(path, texts(20))
    with pytest.raises(DataError, match=r"x\.jsonl: 20 records, and there were 50: it has changed"):
        list(corpus.read())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', r"not JSON: .* at column 13"),
        (b'{"txt": "a"}', r"no 'text', 'messages'.*has: 'txt'\); name the key .* with --field"),
        (b'{"text": 3}', r"'text' is a number, neither text nor a list of turns"),
        (b"[1]", r"a list, not a JSON object"),
        (b'{"messages": [{"role": "user", "contents": "x"}]}', r"no 'content'; did you mean 'con"),
        (b'{"messages": [{}]}', r"'messages\[0\]' is no turn"),
        (b'{"text": "\xff"}', r"invalid UTF-8: byte 0xff"),
        (b'{"text": "\\ud800"}', r"half a surrogate pair"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{problem}"):
        opened(path)


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "there.jsonl", texts(1))
    with pytest.raises(DataError, match=r"--train .*ther\.jsonl: no such file.*there\.jsonl'\?"):
        opened(tmp_path / "ther.jsonl")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: no 'text'.*columns are: 'body'.*--field"):
        opened(tmp_path / "t.parquet")
    assert next(iter(opened(tmp_path / "t.parquet", field="body").read())).text == "x"
    with pytest.raises(DataError, match=r"no key 'bdy'; did you mean 'body'"):
        opened(tmp_path / "t.parquet", field="bdy")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no document"):
        opened(tmp_path / "empty.jsonl")
    (tmp_path / "plain.txt").write_text("one\ntwo\n")
    assert [one.text for one in opened(tmp_path / "plain.txt").read()] == ["one\ntwo\n"]
    lines = opened(tmp_path / "plain.txt", text_documents="line")
    assert [one.text for one in lines.read()] == ["one", "two"]
    with pytest.raises(DataError, match="plain text has no field 'body'"):
        opened(tmp_path / "plain.txt", field="body")


def test_what_is_text_in_a_record() -> None:
    asked, said = Turn(role="user", content="a"), Turn(role="assistant", content="b")
    assert content(chat("a", "b"), None) == ("a\nb", (asked, said))
    assert content({"prompt": "a", "completion": "b", "text": "c"}, None) == ("a\nb", (asked, said))
    assert content({"messages": None, "text": "c"}, None) == ("c", ())
    assert content({"conversation": chat("a", "b")["messages"]}, None)[1] == (asked, said)
    assert content({"other": ["p", "q"]}, "other") == ("p\n\nq", ())
    assert content("bare", None) == ("bare", ())
    assert content({"messages": []}, None) == ("", ())
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}, {"text": "y"}]}
    called = {"role": "assistant", "content": None}
    assert content({"messages": [parts, called]}, None)[0] == "x\ny\n"
    with pytest.raises(BadRecordError, match=r"'other' is null"):
        content({"other": None}, "other")
    ids = [own_id({"id": value}) for value in ("x", 3, True, None, "", 1.5, "\ud800")]
    assert ids == ["x", "3", None, None, None, None, None]


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tokens")
    source = write_lines(root / "t.jsonl", [{"text": f"text {n} " * 3} for n in range(300)])
    preprocess(
        PreprocessSettings(
            inputs=(str(source),),
            output_prefix=str(root / "t"),
            tokenizer_type="CharLevelTokenizer",
            append_eod=True,
        )
    )
    return str(root / "t_text_document")


def test_tokenised_data_is_text_again(tokenised: str) -> None:
    corpus = opened(tokenised)
    documents = list(corpus.read())
    assert [one.text for one in documents] == [f"text {n} " * 3 for n in range(300)]
    assert documents[4].id == "t_text_document:4"
    assert documents[4].tokens is not None
    tokenizer = build_tokenizer("CharLevelTokenizer")
    assert documents[4].tokens.tolist() == [*tokenizer.encode("text 4 " * 3), tokenizer.eod]
    assert documents[4].tokenizer == tokenizer.sha256
    some = [one.id for one in corpus.read(120, 125)]
    assert some == [f"t_text_document:{n}" for n in range(120, 125)]


def test_domains_of_a_configuration_are_their_training_part(tokenised: str) -> None:
    domains = {"web": DomainConfig(train=[tokenised])}
    train = opened("web", domains=domains, split="80,20,0")
    with TokenReader(tokenised) as reader:
        assert 200 < len(train) < reader.num_documents == 300
    assert [one.id for one in train.read(0, 1)] == ["web:0"]
    own = {"web": DomainConfig(train=[tokenised], valid=[tokenised])}
    assert len(opened("web", domains=own, split="80,20,0")) == 300
    assert train.fingerprint() != opened("web", domains=own, split="80,20,0").fingerprint()
    with pytest.raises(DataError, match=r"--train wbe: .*; did you mean 'web'\? \(its domains: we"):
        opened("wbe", domains=domains, split="80,20,0")


def test_tokens_of_another_tokenizer_are_refused(tokenised: str, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(Path(tokenised + suffix).read_bytes())
    with pytest.raises(DataError, match=r"x: tokens, .* give --tokenizer-type and --vocab-file"):
        opened(tmp_path / "x")
    sidecar = json.loads(Path(tokenised + ".meta.json").read_text())
    sidecar["tokenizer"] = {"type": "HFTokenizer", "sha256": "0" * 64}
    (tmp_path / "x.meta.json").write_text(json.dumps(sidecar))
    with pytest.raises(DataError, match=r"made by a HFTokenizer"):
        opened(tmp_path / "x")
    with pytest.raises(DataError, match=r"x: tokenised by another tokenizer"):
        opened(tmp_path / "x", tokenizer=build_tokenizer("CharLevelTokenizer"))


def test_labels_of_a_domain_come_along(tokenised: str, tmp_path: Path) -> None:
    with TokenReader(tokenised) as reader, TokenWriter(tmp_path / "l", "int32") as out:
        for size in reader.document_sizes(0, 300).tolist():
            out.add([-100] * (size - 1) + [1])
    domain = DomainConfig(train=[tokenised], train_labels=[str(tmp_path / "l")])
    corpus = opened("web", domains={"web": domain}, split="1,0,0")
    (row,) = corpus.rows(17, 18)
    assert row.document.labels is not None
    assert row.document.tokens is not None
    assert row.document.labels.tolist() == [-100] * (len(row.document.tokens) - 1) + [1]
    assert re.match("text 17", row.document.text)
