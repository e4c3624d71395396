"""Corpora of the hub, read from copies of their form on this machine's disk."""

from __future__ import annotations

import json

import pytest
from support.source import ROOT

from megatron.data.corpora import hub
from megatron.data.corpora.hub import Limits, bring, value_at
from megatron.data.corpora.prepare import data_config
from megatron.data.corpora.public import CORPORA, WITHDRAWN, Corpus, Hub, find, slug
from megatron.data.corpora.tokenise import TokenizerChoice
from megatron.errors import DataError

datasets = pytest.importorskip("datasets")

SLIM = find("slimpajama")


def quiet(_: str) -> None:
    pass


def rows(count: int) -> list[dict[str, object]]:
    sets = SLIM.domains
    return [
        {"text": f"document {n} é", "meta": {"redpajama_set_name": sets[n % len(sets)]}}
        for n in range(count)
    ]


@pytest.fixture
def parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "copy" / "data"
    folder.mkdir(parents=True)
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows(140)[part * 70 : part * 70 + 70])
        pyarrow.parquet.write_table(table, folder / f"train-0000{part}-of-00002.parquet")
    return tmp_path / "copy"


def texts(files) -> list[str]:
    return [json.loads(line)["text"] for path in files for line in path.read_text().splitlines()]


def test_a_copy_in_parquet_is_shared_out_to_domains(parquet, tmp_path):
    found = bring(SLIM, tmp_path / "raw", source=str(parquet), limits=Limits(), say=quiet)
    assert list(found) == [
        *("arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia"),
    ]
    for number, name in enumerate(found):
        assert texts(found[name]) == [f"document {n} é" for n in range(number, 140, 7)]


def test_a_saved_dataset_is_read(tmp_path):
    saved = datasets.Dataset.from_list(rows(28))
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "many"))
    for name in ("one", "many"):
        found = bring(
            SLIM, tmp_path / f"raw-{name}", source=str(tmp_path / name), limits=Limits(), say=quiet
        )
        assert texts(found["book"]) == [f"document {n} é" for n in (1, 8, 15, 22)]


def test_limits_hold_for_each_domain(parquet, tmp_path):
    found = bring(SLIM, tmp_path / "a", source=str(parquet), limits=Limits(documents=3), say=quiet)
    assert {len(texts(files)) for files in found.values()} == {3}
    found = bring(SLIM, tmp_path / "b", source=str(parquet), limits=Limits(bytes=30), say=quiet)
    assert {len(texts(files)) for files in found.values()} == {3}  # 13 to 15 bytes each


def test_an_interrupted_reading_goes_on_where_it_was(parquet, tmp_path, monkeypatch):
    whole = bring(
        SLIM, tmp_path / "a", source=str(parquet), limits=Limits(), shard_documents=30, say=quiet
    )
    real = hub.value_at
    calls = 0

    def breaks(record, path):
        nonlocal calls
        calls += 1
        if calls > 140:  # two calls a document: in the middle of the third set of shards
            raise RuntimeError("killed")
        return real(record, path)

    monkeypatch.setattr(hub, "value_at", breaks)
    with pytest.raises(RuntimeError):
        bring(
            SLIM,
            tmp_path / "b",
            source=str(parquet),
            limits=Limits(),
            shard_documents=30,
            say=quiet,
        )
    assert list((tmp_path / "b").rglob("*.tmp"))
    calls = -10_000
    said = []
    found = bring(
        SLIM,
        tmp_path / "b",
        source=str(parquet),
        limits=Limits(),
        shard_documents=30,
        say=said.append,
    )
    assert said[0] == "slimpajama: going on after 60 documents"
    assert calls + 10_000 == 160  # the 80 documents left, and no more
    assert {name: texts(files) for name, files in found.items()} == {
        name: texts(files) for name, files in whole.items()
    }
    assert not list((tmp_path / "b").rglob("*.tmp"))


def test_a_finished_reading_opens_nothing(parquet, tmp_path, monkeypatch):
    first = bring(SLIM, tmp_path / "raw", source=str(parquet), limits=Limits(), say=quiet)
    monkeypatch.setattr(hub, "_open", lambda *_: pytest.fail("opened again"))
    assert bring(SLIM, tmp_path / "raw", source=str(parquet), limits=Limits(), say=quiet) == first


def test_other_settings_in_the_same_folder_are_refused(parquet, tmp_path):
    bring(SLIM, tmp_path / "raw", source=str(parquet), limits=Limits(documents=2), say=quiet)
    with pytest.raises(DataError, match="documents 2 then, 3 now"):
        bring(SLIM, tmp_path / "raw", source=str(parquet), limits=Limits(documents=3), say=quiet)


def test_a_foreign_dataset_is_told(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.jsonl").write_text('{"text": "x", "other": 1}\n' * 3)
    with pytest.raises(DataError, match=r"no document of arxiv.*meta\.redpajama_set_name"):
        bring(SLIM, tmp_path / "raw", source=str(tmp_path / "copy"), limits=Limits(), say=quiet)


def test_a_corpus_without_domains_is_one(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.jsonl").write_text('{"text": "x"}\n{"text": " "}\n{"text": "y"}\n')
    found = bring(
        find("fineweb"), tmp_path / "raw", source=str(tmp_path / "copy"), limits=Limits(), say=quiet
    )
    assert {name: texts(files) for name, files in found.items()} == {"fineweb": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fineweb", ConnectionError("no route"), "cannot reach .*no route.*--source FOLDER"),
        (
            "the_stack",
            datasets.exceptions.DatasetNotFoundError("gated"),
            "accepted its terms.*HF_TOKEN",
        ),
        ("fineweb", ValueError("bad\nmore"), "cannot open .*ValueError: bad$"),
    ],
)
def test_a_hub_that_cannot_be_read_is_told(monkeypatch, tmp_path, name, error, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=message):
        bring(find(name), tmp_path / "raw", limits=Limits(), say=quiet)


def test_the_hub_is_asked_for_what_the_catalogue_says(monkeypatch, tmp_path):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    bring(find("fineweb"), tmp_path / "raw", limits=Limits(), say=quiet)
    assert asked == [
        (
            ("HuggingFaceFW/fineweb", "sample-10BT"),
            {"split": "train", "streaming": True, "data_files": None},
        )
    ]


def test_values_under_dotted_names():
    assert value_at({"meta": {"a": 1}}, "meta.a") == 1
    assert value_at({"meta": '{"a": 1}'}, "meta.a") == 1
    assert value_at({"meta": "no"}, "meta.a") is None
    assert value_at({}, "meta.a") is None


def test_names_of_domains_are_names():
    for corpus in CORPORA.values():
        names = list(corpus.domain_names.values())
        assert len(set(names)) == len(names)
        assert all(name.isidentifier() or name[0].isdigit() for name in names), names
    assert slug("C#") == "csharp"


def test_unknown_and_withdrawn_corpora_are_told():
    with pytest.raises(DataError, match="did you mean 'fineweb'"):
        find("finewebb")
    for name in WITHDRAWN:
        with pytest.raises(DataError, match="withdrawn"):
            find(name)
    assert find("The-Stack").name == "the_stack"


NEOX_NAMES = (
    "enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3 hackernews "
    "openwebtext2 stackexchange ubuntu_irc youtube_subtitles c4 c4_openwebtext enwik8"
)


@pytest.mark.parametrize("name", NEOX_NAMES.split())
def test_every_name_of_gpt_neox_is_known(name):
    assert name in CORPORA or name in WITHDRAWN


PREPARED = [
    path
    for path in sorted((ROOT / "configs" / "data").glob("*.yml"))
    if path.stem not in ("pile_22", "redpajama")  # for data that the user has
]


@pytest.mark.parametrize("path", PREPARED, ids=str)
def test_ready_configurations_are_what_prepare_data_writes(path):
    from pathlib import Path

    choice = TokenizerChoice(
        kind="GPT2BPETokenizer",
        vocab_file=Path("data/gpt2-vocab.json"),
        merge_file=Path("data/gpt2-merges.txt"),
    )
    assert path.read_text() == data_config(find(path.stem), Path("data"), choice)


def test_a_corpus_of_one_named_domain_keeps_its_name():
    one = Corpus(name="x", about="", source=Hub(repository="a/b", domain="k"), domains=("V",))
    assert one.domain_names == {"V": "v"}
