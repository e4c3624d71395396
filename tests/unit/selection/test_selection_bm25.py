"""BM25 against rank_bm25's Okapi, and counting in bounded memory."""

from __future__ import annotations

import argparse
import itertools
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rank_bm25 import BM25Okapi
from scipy.stats import spearmanr
from support.selection_cases import ListedCorpus, chat, mixed_corpus, precision, target

from megatron.errors import ConfigError, DataError, MissingExtraError
from megatron.selection import bm25, document_frequencies
from megatron.selection.base import Document, Target
from megatron.selection.bm25 import Bm25
from megatron.selection.document_frequencies import Limits
from megatron.selection.words import words


def naive_words(text: str) -> list[str]:
    """The preparation again, a character at a time."""
    kept = (" " if one == "\n" else one for one in text.lower())
    return "".join(one for one in kept if one not in string.punctuation).split(" ")


def okapi(texts: list[str], queries: list[str], **parameters: float) -> NDArray[np.float64]:
    """What rank_bm25 gives, [documents, queries]."""
    model = BM25Okapi([naive_words(one) for one in texts], **parameters)
    return np.stack([model.get_scores(naive_words(one)) for one in queries], axis=1)


def scored(
    selector: Bm25, texts: list[str] | list[Document], targets: list[Target], folder: Path
) -> NDArray[np.float64]:
    corpus = ListedCorpus(texts)
    selector.prepare(corpus, targets, folder, lambda line: None)
    selector.open(folder, targets)
    found, cost = selector.score(corpus.documents)
    assert (cost.flops, cost.tokens) == (0.0, 0)
    return found


def random_texts(seed: int, documents: int) -> list[str]:
    """Texts of few words, several in most documents, with capitals, marks, lines and gaps."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"Word{at}" for at in range(60)] + ["the", "don't", "Ünïcode", "3.5"]
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    weights[-4:] = [1, 0.3, 0.2, 0.2]
    gaps = [" ", "\n", "  ", ", ", " - ", "\t"]
    texts = []
    for _ in range(documents):
        length = rng.integers(0, 40)
        picked = rng.choice(vocabulary, size=length, p=weights / weights.sum())
        between = rng.choice(gaps, size=length, p=[0.6, 0.1, 0.1, 0.1, 0.05, 0.05])
        texts.append("".join(itertools.chain.from_iterable(zip(picked, between, strict=True))))
    return texts


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_rank_bm25s(seed: int, tmp_path: Path) -> None:
    texts = [*random_texts(seed, 300), "", "!?", "the the the"]
    queries = [*random_texts(seed + 100, 5), "the the the of Word1 word1 unheard"]
    targets = [target(str(at), one) for at, one in enumerate(queries) if one]
    expected = okapi(texts, [one for one in queries if one])
    found = scored(Bm25(), texts, targets, tmp_path)
    blank = np.array([not "".join(naive_words(one)).strip() for one in texts])
    assert blank.sum() >= 2
    assert np.isnan(found[blank]).all()
    np.testing.assert_array_equal(found[~blank], expected[~blank])
    for ours, theirs in zip(found[~blank].T, expected[~blank].T, strict=True):
        assert spearmanr(ours, theirs).statistic == pytest.approx(1, abs=1e-12)


def test_a_word_of_most_documents_has_the_part_epsilon_of_the_mean_weight(tmp_path: Path) -> None:
    texts = ["a b", "a c", "a d", "b e f"]
    for epsilon in (0.25, 0.0, 2.0):
        found = scored(Bm25(epsilon=epsilon), texts, [target("t", "a")], tmp_path / str(epsilon))
        np.testing.assert_allclose(found, okapi(texts, ["a"], epsilon=epsilon), atol=1e-12)
        assert (found[0, 0] > 0) == (epsilon > 0)


@pytest.mark.parametrize("parameters", [{"k1": 0.9}, {"b": 0.1}, {"k1": 2.0, "b": 1.0}])
def test_the_formulas_parameters_are_rank_bm25s(
    parameters: dict[str, float], tmp_path: Path
) -> None:
    texts = [f"{one} end" for one in random_texts(7, 80)]
    found = scored(Bm25(**parameters), texts, [target("t", "word1 word2 end")], tmp_path)
    expected = okapi(texts, ["word1 word2 end"], **parameters)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    plain = scored(Bm25(), texts, [target("t", "word1 word2 end")], tmp_path / "plain")
    assert np.abs(found - plain).max() > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8), min_size=1),
    query=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    limit=st.integers(1, 5),
)
def test_any_small_corpus_and_any_segments(
    documents: list[list[str]],
    query: list[str],
    limit: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    texts, question = [" ".join(one) for one in documents], " ".join(query)
    selector = Bm25(limits=Limits(documents=limit, words=3))
    found = scored(selector, texts, [target("t", question)], tmp_path_factory.mktemp("segments"))
    np.testing.assert_array_equal(found, okapi(texts, [question]))


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_words_are_the_released_ones(text: str) -> None:
    assert words(text) == naive_words(text)


def test_words_that_no_file_likes(tmp_path: Path) -> None:
    texts = ["a\u2028b \x00 c\rd", "\ud800 \x00", "tab\there x", "\x85 \x0b x"]
    selector = Bm25(limits=Limits(documents=1, words=1))
    query = "\x00 \ud800 c\rd tab\there \x85"
    found = scored(selector, texts, [target("t", query)], tmp_path)
    np.testing.assert_allclose(found, okapi(texts, [query]), atol=1e-12)


def test_a_documents_scores_do_not_depend_on_its_batch_to_the_bit(tmp_path: Path) -> None:
    texts = [f"{one} x" for one in random_texts(3, 200)]
    targets = [target("a", *random_texts(4, 5)), target("b", "x word3 word3")]
    selector = Bm25()
    whole = scored(selector, texts, targets, tmp_path)
    documents = ListedCorpus(texts).documents
    for size in (1, 7, 64):
        parts = [
            selector.score(documents[at : at + size])[0] for at in range(0, len(documents), size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = Bm25()
    other.open(tmp_path, targets)
    np.testing.assert_array_equal(other.score(documents[::-1])[0], whole[::-1])
    assert selector.score([])[0].shape == (0, 2)


def test_counting_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(5, 400)
    targets = [target("t", *random_texts(6, 3))]
    expected = scored(Bm25(), texts, targets, tmp_path / "plain")
    monkeypatch.setattr(document_frequencies, "_MERGED_AT_ONCE", 4)
    monkeypatch.setattr(document_frequencies, "_BATCH", 5)
    selector = Bm25(limits=Limits(documents=30, words=50))
    corpus = ListedCorpus(texts)
    folder = tmp_path / "killed"

    kills = 0
    while True:
        said: list[str] = []

        def say(line: str, said: list[str] = said) -> None:
            said.append(line)
            if len(said) == 2:
                raise KeyboardInterrupt

        try:
            selector.prepare(corpus, targets, folder, say)
            break
        except KeyboardInterrupt:
            kills += 1
            (folder / "frequencies-000000000000000-000000000000400.tmp").write_bytes(b"torn")
    assert kills > 3
    assert corpus.read_from == sorted(set(corpus.read_from)), "no document is read twice"
    selector.open(folder, targets)
    np.testing.assert_array_equal(selector.score(corpus.documents)[0], expected)
    assert [one.name for one in folder.iterdir()] == ["statistics.json"]


def test_a_merge_killed_before_its_parts_are_removed_counts_them_once(tmp_path: Path) -> None:
    texts = random_texts(8, 60)
    folder, limits = tmp_path / "frequencies", Limits(documents=10)
    folder.mkdir()
    wanted = words(" ".join(texts))

    def count() -> document_frequencies.Statistics:
        return document_frequencies.count(
            ListedCorpus(texts), lambda one: words(one.text), wanted, folder, print, limits
        )

    expected = count()
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    document_frequencies._merge(folder, document_frequencies._found(folder)[:4])
    for path, content in kept.items():
        path.write_bytes(content)
    assert count() == expected


def test_a_vocabulary_too_large_to_sum_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_frequencies, "_SUMMED_IN_ORDER", 20)
    texts = [f"{one} the" for one in random_texts(2, 100)]
    found = scored(Bm25(), texts, [target("t", "the word1 word2")], tmp_path)
    np.testing.assert_allclose(found, okapi(texts, ["the word1 word2"]), rtol=1e-9)


def test_what_of_a_chat_is_read(tmp_path: Path) -> None:
    documents = [chat("apple pie", "pear"), chat("plum", "apple"), chat("fig", "fig", number=2)]
    first = scored(Bm25(), documents, [target("t", "apple")], tmp_path / "first")
    whole = scored(Bm25(messages="all"), documents, [target("t", "apple")], tmp_path / "all")
    np.testing.assert_allclose(first, okapi(["apple pie", "plum", "fig"], ["apple"]))
    np.testing.assert_allclose(
        whole, okapi(["apple pie\npear", "plum\napple", "fig\nfig"], ["apple"])
    )


def test_examples_joined_and_their_mean(tmp_path: Path) -> None:
    texts = [f"{one} x" for one in random_texts(9, 50)]
    examples = ["word1 word2", "word2 word5 x", "word9"]
    single = okapi(texts, examples)
    joined = scored(Bm25(), texts, [target("t", *examples)], tmp_path / "joined")
    mean = scored(Bm25(examples="mean"), texts, [target("t", *examples)], tmp_path / "mean")
    np.testing.assert_allclose(joined[:, 0], single.sum(axis=1), atol=1e-9)
    np.testing.assert_allclose(mean[:, 0], single.mean(axis=1), atol=1e-9)


def test_a_targets_answers_are_read(tmp_path: Path) -> None:
    asked = Target(name="t", documents=(chat("question", "apple"),))
    found = scored(Bm25(), ["apple", "pear", "plum", "fig"], [asked], tmp_path)
    assert found[0, 0] > 0


def test_words_that_the_corpus_does_not_have_score_nothing(tmp_path: Path) -> None:
    assert (scored(Bm25(), ["a b", "c"], [target("t", "z")], tmp_path) == 0).all()


def test_the_targets_documents_are_found(tmp_path: Path) -> None:
    texts, is_target, examples = mixed_corpus(seed=1)
    found = scored(Bm25(), texts, [target("t", *examples)], tmp_path)
    assert precision(found[:, 0], is_target) > is_target.mean() + 0.5


def test_flags_make_the_selector() -> None:
    parser = argparse.ArgumentParser()
    bm25.add_arguments(parser)
    assert bm25.from_options(parser.parse_args([])) == Bm25()
    flags = "--messages all --examples mean --aggregate max --k1 2 --b 0.5 --epsilon 0.1"
    made = bm25.from_options(parser.parse_args(flags.split()))
    assert made == Bm25(messages="all", examples="mean", aggregate="max", k1=2, b=0.5, epsilon=0.1)
    assert made.parameters() != Bm25().parameters()


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    bm25.add_arguments(parser)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"bm25s.*neomix\[select\]"):
        bm25.from_options(parser.parse_args([]))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--b 1\.5"):
        Bm25(b=1.5)
    with pytest.raises(ConfigError, match="--k1 -1"):
        Bm25(k1=-1)
    with pytest.raises(ConfigError, match="--messages 'last'"):
        Bm25(messages="last")
    with pytest.raises(DataError, match="'empty'"):
        Bm25().prepare(ListedCorpus(["a"]), [target("empty", "", "?!")], Path(), print)
