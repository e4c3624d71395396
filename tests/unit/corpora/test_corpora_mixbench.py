"""MixBench's data: complete families, draws that differ, splits that share nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from support.source import ROOT

import prepare_data
from megatron.config import load_config
from megatron.data.corpora import mixbench
from megatron.data.corpora.documents import SPLITS, Document
from megatron.data.corpora.languages import Markov
from megatron.data.reader import TokenReader
from megatron.errors import DataError, run_command
from megatron.training import counting
from megatron.training.check import check


def stories():
    """Four hundred texts, some of them twice over, with letters that are not ASCII."""
    rng = np.random.default_rng(0)
    for number in range(400):
        words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(30)]
        text = f"{number} né " + " ".join(words) + "\n"
        yield Document(text=text, source=str(number))
        if number % 10 == 0:
            yield Document(text=text, source="again")


@pytest.fixture
def small(monkeypatch):
    """Families of a few documents, with a made-up text for the real ones."""
    monkeypatch.setattr(mixbench, "_DOCUMENTS", {"train": 12, "valid": 3, "test": 3})
    monkeypatch.setattr(mixbench, "TEXTS", dict.fromkeys(mixbench.TEXTS, stories))


def documents(prefix):
    reader = TokenReader(prefix)
    sizes = reader.document_sizes(0, reader.num_documents)
    ends = np.cumsum(sizes)
    found = [
        bytes(reader.read(end - size, end).astype(np.uint8))
        for end, size in zip(ends, sizes, strict=True)
    ]
    reader.close()
    return found


def run(*arguments):
    return run_command(lambda: prepare_data.main([str(argument) for argument in arguments]))


def test_the_families_are_what_the_documentation_says():
    every = {**mixbench.GENERATED, **mixbench.TEXTS}
    assert len(every) == len(mixbench.GENERATED) + len(mixbench.TEXTS)
    for name, family in mixbench.FAMILIES.items():
        assert len(family.domains) == int(name[1:])
        assert len(set(family.domains)) == len(family.domains)
        assert set(family.domains) <= every.keys()
        assert family.room is (name[0] in "mr")
    sizes = [len(family.domains) for family in mixbench.FAMILIES.values()]
    assert {2, 3, 7} == set(sizes)
    assert {family.room for family in mixbench.FAMILIES.values()} == {True, False}


def test_every_language_fits_the_vocabulary_and_has_an_entropy():
    for make in mixbench.GENERATED.values():
        language = make(5)
        assert int(language.write(3, 400, 1).max()) < mixbench.VOCABULARY
        assert 0.0 <= language.entropy <= np.log(mixbench.VOCABULARY)


@pytest.mark.parametrize("name", mixbench.FAMILIES)
def test_a_family_is_complete(name, small, tmp_path):
    mixbench.prepare(tmp_path, [name], [0], say=lambda _: None)
    folder, family = tmp_path / f"{name}-0", mixbench.FAMILIES[name]
    facts = json.loads((folder / mixbench.FACTS).read_text())
    assert (facts["family"], facts["draw"], facts["room"]) == (name, 0, family.room)
    assert list(facts["entropies"]) == [d for d in family.domains if d in mixbench.GENERATED]
    config = yaml.safe_load((folder / mixbench.CONFIG).read_text())
    assert config["vocab_size"] == mixbench.VOCABULARY
    assert list(config["domains"]) == list(family.domains)
    for domain, prefixes in config["domains"].items():
        assert list(prefixes) == list(SPLITS)
        for split, prefix in prefixes.items():
            made = documents(prefix)
            assert all(max(document) < mixbench.VOCABULARY for document in made)
            if domain in mixbench.GENERATED:
                assert [len(document) for document in made] == [1024] * (12, 3, 3)[
                    SPLITS.index(split)
                ]
    assert not list(folder.rglob("*.tmp"))


def test_an_entropy_is_that_of_the_text_that_was_written(small, tmp_path):
    mixbench.prepare(tmp_path, ["m2"], [3], say=lambda _: None)
    facts = json.loads((tmp_path / "m2-3" / mixbench.FACTS).read_text())
    language = mixbench.GENERATED["rich"](mixbench._seed("rich", 3))
    assert isinstance(language, Markov)
    assert facts["entropies"]["rich"] == language.entropy
    written = documents(tmp_path / "m2-3" / "rich" / "valid")
    assert written == [bytes(row.astype(np.uint8)) for row in language.write(3, 1024, seed=1)]


def test_the_same_draw_is_the_same_and_another_is_not(small, tmp_path):
    for folder in ("one", "two"):
        mixbench.prepare(tmp_path / folder, ["r3"], [0, 1], say=lambda _: None)
    for domain in mixbench.FAMILIES["r3"].domains:
        for split in SPLITS:
            place = f"{domain}/{split}"
            one = documents(tmp_path / "one" / "r3-0" / place)
            assert one == documents(tmp_path / "two" / "r3-0" / place)
            assert one != documents(tmp_path / "one" / "r3-1" / place)
    facts = [
        json.loads((tmp_path / "one" / f"r3-{draw}" / mixbench.FACTS).read_text())
        for draw in (0, 1)
    ]
    assert facts[0]["entropies"] != facts[1]["entropies"]


def test_a_language_is_the_same_in_every_family(small, tmp_path):
    """So that losses of one family can be compared with another's."""
    mixbench.prepare(tmp_path, ["m2", "m3"], [0], say=lambda _: None)
    assert documents(tmp_path / "m2-0/rich/train") == documents(tmp_path / "m3-0/rich/train")


def test_halves_of_a_text_and_splits_of_a_half_share_no_document(small, tmp_path):
    mixbench.prepare(tmp_path, ["t3"], [0, 1, 2], say=lambda _: None)
    for domain in mixbench.FAMILIES["t3"].domains:
        halves = []
        for draw in (0, 1):
            splits = [set(documents(tmp_path / f"t3-{draw}" / domain / split)) for split in SPLITS]
            assert all(splits)
            assert sum(map(len, splits)) == len(set.union(*splits))
            halves.append(set.union(*splits))
        assert not halves[0] & halves[1]
        assert len(halves[0] | halves[1]) == 400, "a text was lost, or came twice"
        again = documents(tmp_path / "t3-2" / domain / "train")
        assert again == documents(tmp_path / "t3-0" / domain / "train"), "there are two halves"


def test_what_is_not_ascii_is_one_token(small, tmp_path):
    mixbench.prepare(tmp_path, ["t3"], [0], say=lambda _: None)
    assert all(b" n? " in document for document in documents(tmp_path / "t3-0/code/train"))


def test_a_second_call_makes_nothing_and_a_cut_one_is_made_anew(small, tmp_path, monkeypatch):
    said = []
    mixbench.prepare(tmp_path, ["m2", "l2"], [0], say=said.append)
    assert len(said) == 2
    assert "m2-0: noise, rich" in said[0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    mixbench.prepare(tmp_path, ["m2", "l2"], [0], say=said.append)
    assert len(said) == 2
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before

    def breaks(folder, language):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mixbench, "_write_language", breaks)
        with pytest.raises(KeyboardInterrupt):
            mixbench.prepare(tmp_path, ["m2"], [1], say=said.append)
    assert len(said) == 2
    mixbench.prepare(tmp_path, ["m2"], [1], say=said.append)
    assert len(said) == 3
    for text in ("", "[]", "no json", '{"version": 0}'):
        (tmp_path / "m2-1" / mixbench.FACTS).write_text(text)
        mixbench.prepare(tmp_path, ["m2"], [1], say=said.append)
    assert len(said) == 7


def test_a_family_trains(small, tmp_path, monkeypatch):
    """Its configuration and the shared one pass the check of a run, which counts no text."""

    def counts(windows, vocab_size):
        raise AssertionError("a check counted the training data")

    monkeypatch.setattr(counting, "count_loss", counts)
    said = []
    mixbench.prepare(tmp_path, ["m2"], [0], say=said.append)
    configs = ROOT / "configs"
    files = [configs / "mixbench/base.yml", tmp_path / "m2-0" / mixbench.CONFIG]
    files = [*map(str, files), str(configs / "mixing/auto.yml")]
    config = load_config(files, overrides=[f"run_dir={tmp_path / 'run'}", "train_iters=5"])
    assert check(config, world_size=1, gpus=0, say=said.append) == 0
    assert not (tmp_path / "run").exists()


def test_what_does_not_exist_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(DataError, match="there is no family 'm33'; did you mean 'm3'"):
        mixbench.prepare(tmp_path, ["m2", "m33"])
    with pytest.raises(DataError, match="draw -1 does not exist"):
        mixbench.prepare(tmp_path, ["m2"], [0, -1])
    assert not list(tmp_path.iterdir())


def test_the_command(small, tmp_path, capsys):
    assert run("mixbench", "-d", tmp_path, "--families", "m2", "l2") == 0
    made = {path.name for path in (tmp_path / "mixbench").iterdir() if path.is_dir()}
    assert made == {"m2-0", "m2-1", "l2-0", "l2-1"}
    assert capsys.readouterr().out.count("made ") == 4
    assert run("mixbench", "-d", tmp_path, "--families", "m2", "rr7") == 2
    told = capsys.readouterr().err
    assert "there is no family 'rr7'; did you mean 'r7'" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("corpus", ["quickstart", "enron", "pass"])
def test_families_of_another_corpus_are_refused(corpus, tmp_path, capsys):
    assert run(corpus, "-d", tmp_path, "--families", "m2") == 2
    told = capsys.readouterr().err
    assert f"--families chooses families of mixbench, and '{corpus}' has none" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())
