"""``prepare_data.py`` as a user calls it: done once, continued, refused with one message."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
import yaml
from support.source import ROOT

import prepare_data
from megatron.data.corpora import prepare, quickstart
from megatron.data.corpora.arithmetic import exercises
from megatron.data.corpora.quickstart import Recipe
from megatron.data.corpora.records import files
from megatron.data.reader import TokenReader
from megatron.errors import DataError, run_command
from megatron.tokenizer.train import train_byte_level_bpe

pytest.importorskip("tokenizers")

SMALL = {
    "arithmetic": Recipe(documents=lambda: exercises(size=400_000), limit=400_000),
    "records": Recipe(documents=lambda: files(size=400_000), limit=400_000),
}


def texts(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "quickstart"
    said: list[str] = []
    quickstart.prepare(root, recipes=SMALL, say=said.append)
    return root, said


def snapshot(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.suffix in {".jsonl", ".bin", ".idx"} or path.name == "tokenizer.json"
    }


def test_every_split_of_every_domain_is_tokenised(prepared):
    from megatron.tokenizer import build_tokenizer

    root, _ = prepared
    tokenizer = build_tokenizer("HFTokenizer", str(root / "tokenizer.json"))
    assert tokenizer.vocab_size == quickstart.VOCABULARY
    for name in SMALL:
        held = {}
        for split in ("train", "valid", "test"):
            held[split] = texts(root / "raw" / name / f"{split}.jsonl")
            with TokenReader(root / name / f"{split}_text_document") as reader:
                assert reader.num_documents == len(held[split])
                start, stop = reader.document_start(0), reader.document_start(1)
                tokens = reader.read(start, stop).tolist()
            assert tokens[-1] == tokenizer.eod
            assert tokenizer.decode(tokens[:-1]) == held[split][0]
        assert not set(held["train"]) & set(held["valid"])
        assert not set(held["train"]) & set(held["test"])
        assert not set(held["valid"]) & set(held["test"])


def test_a_second_call_says_that_it_is_done(prepared):
    root, _ = prepared
    before = snapshot(root)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    said: list[str] = []
    quickstart.prepare(root, recipes=SMALL, say=said.append)
    assert len(said) == 1
    assert "is done (2 domains, made by Python" in said[0]
    assert snapshot(root) == before
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("breaks_at", [0, 1, 4])
def test_an_interrupted_call_is_taken_up(prepared, tmp_path, monkeypatch, breaks_at):
    root, _ = prepared
    real, calls = quickstart.tokenise, 0

    def breaks(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > breaks_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(quickstart, "tokenise", breaks)
    with pytest.raises(KeyboardInterrupt):
        quickstart.prepare(tmp_path / "q", recipes=SMALL, say=lambda _: None)
    assert not (tmp_path / "q" / "manifest.json").exists()
    monkeypatch.setattr(quickstart, "tokenise", real)
    said: list[str] = []
    quickstart.prepare(tmp_path / "q", recipes=SMALL, say=said.append)
    assert not [line for line in said if line.startswith(("made", "training"))]  # not again
    assert snapshot(tmp_path / "q") == snapshot(root)


def test_a_file_damaged_since_is_told(prepared, tmp_path):
    import shutil

    root = shutil.copytree(prepared[0], tmp_path / "q")
    (root / "records" / "valid_text_document.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"valid_text_document\.bin is not as it was made"):
        quickstart.prepare(root, recipes=SMALL, say=lambda _: None)


def test_the_ready_configuration_names_every_domain():
    settings = yaml.safe_load((ROOT / "configs" / "local" / "quickstart.yml").read_text())
    assert set(settings["domains"]) == set(quickstart.RECIPES)
    assert len(settings["domains"]) >= 5
    for name, domain in settings["domains"].items():
        assert domain == {
            split: f"data/quickstart/{name}/{split}_text_document"
            for split in ("train", "valid", "test")
        }
    assert "mixing" not in settings


@pytest.fixture
def tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_byte_level_bpe(["some text", "more text"], path, vocab_size=300)
    return path


def run(*arguments: object) -> int:
    return run_command(lambda: prepare_data.main([str(argument) for argument in arguments]))


def test_a_hub_corpus_from_a_copy(tmp_path, tokenizer_file, capsys):
    pytest.importorskip("datasets")
    copy = tmp_path / "copy"
    copy.mkdir()
    sets = prepare.find("slimpajama").domains
    (copy / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"text {n}", "meta": {"redpajama_set_name": sets[n % 7]}}) + "\n"
            for n in range(70)
        )
    )
    arguments = ["slimpajama", "-t", "HFTokenizer", "-v", tokenizer_file, "-d", tmp_path / "data"]
    arguments += ["--source", copy, "--max-documents", 4]
    assert run(*arguments) == 0
    for name in ("arxiv", "wikipedia"):
        with TokenReader(
            tmp_path / "data" / "slimpajama" / name / f"{name}_text_document"
        ) as found:
            assert found.num_documents == 4
    config = yaml.safe_load((tmp_path / "data" / "slimpajama" / "data.yml").read_text())
    assert config["vocab_file"] == str(tokenizer_file)
    for domain in config["domains"].values():
        assert (tmp_path / f"{domain['train']}.bin").exists()
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().out.count("was done before") == 7
    assert run(*arguments[:-1], 5) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_a_corpus_of_files(tmp_path, tokenizer_file, capsys):
    source = tmp_path / "enron_emails.jsonl.gz"
    with gzip.open(source, "wt") as stream:
        stream.write('{"text": "one"}\n{"text": "two"}\n')
    arguments = ["enron", "-t", "HFTokenizer", "-v", tokenizer_file, "-d", tmp_path / "data"]
    assert run(*arguments, "--source", source.as_uri()) == 0
    with TokenReader(tmp_path / "data" / "enron" / "enron_text_document") as reader:
        assert reader.num_documents == 2
    assert "./deepy.py train.py" in capsys.readouterr().out
    assert run(*arguments, "--source", source, "--max-bytes", "1k") == 2
    assert "do not apply" in capsys.readouterr().err


def test_an_archive_of_one_text_is_cut_into_documents(tmp_path, tokenizer_file):
    import zipfile

    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as packed:
        packed.writestr("enwik8", b"<page>one</page>\n<page>two</page>\n<page>caf\xc3")
    arguments = ["enwik8", "-t", "HFTokenizer", "-v", tokenizer_file, "-d", tmp_path / "data"]
    for _ in range(2):
        assert run(*arguments, "--source", tmp_path / "enwik8.zip") == 0
    with TokenReader(tmp_path / "data" / "enwik8" / "enwik8_text_document") as reader:
        assert reader.num_documents == 3
    raw = tmp_path / "data" / "enwik8" / "raw" / "enwik8.jsonl"
    assert texts(raw) == ["<page>one</page>\n", "<page>two</page>\n", "<page>caf\ufffd"]


def test_gpt2_is_fetched_when_no_tokenizer_is_given(tmp_path, monkeypatch):
    asked = []

    def fetched(url, folder, *, name, sha256, say):
        asked.append((url.rpartition("/")[2], name, len(sha256)))
        return folder / name

    monkeypatch.setattr(prepare, "fetch", fetched)
    assert run("pass", "-d", tmp_path) == 0
    assert asked == [("encoder.json", "gpt2-vocab.json", 64), ("vocab.bpe", "gpt2-merges.txt", 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrat"], "unknown corpus 'quickstrat'; did you mean 'quickstart'?"),
        (["books3"], "withdrawn"),
        (["enron", "-v", "nowhere.json"], "nowhere.json does not exist"),
        (["enron", "-t", "HFTokenizer"], "needs --vocab-file"),
    ],
)
def test_what_cannot_be_done_is_one_message(tmp_path, capsys, arguments, message):
    assert run(*arguments, "-d", tmp_path) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1


def test_two_at_once_are_refused(tmp_path, capsys):
    with prepare._alone(tmp_path / "quickstart"):
        assert run("quickstart", "-d", tmp_path) == 2
    assert "another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("800k", 800_000), ("1.5M", 1_500_000), ("2GB", 2_000_000_000)]
)
def test_sizes(text, size):
    assert prepare_data._size(text) == size


@pytest.mark.parametrize("arguments", [["--max-bytes", "many"], ["--workers", "0"]])
def test_a_wrong_number_is_refused(arguments):
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(["quickstart", *arguments])
    assert stopped.value.code == 2


def test_the_list_names_every_corpus():
    shown = subprocess.run(
        [sys.executable, "prepare_data.py", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("quickstart", "mixbench", "slimpajama", "fineweb", "the_stack", "enwik8"):
        assert f"\n{name} " in f"\n{shown}"
