"""Cosines of sentence vectors against dense computations, and what an encoder costs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from support.selection_cases import ListedCorpus, chat, document, mixed_corpus, precision, target
from torch.utils.flop_counter import FlopCounterMode

from megatron.errors import ConfigError, DataError, MissingExtraError
from megatron.selection import embed
from megatron.selection.base import Cost, Document, Target
from megatron.selection.embed import Embed, unit
from megatron.selection.encoder import Encoder
from megatron.selection.lsa import LsaEncoder, sample
from megatron.selection.sentence_encoder import SentenceEncoder
from megatron.selection.words import prepare

HIDDEN, LAYERS, INNER = 128, 2, 256


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded BERT of two layers, saved by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{at}" for at in range(400))]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder / "plain")
    BertTokenizer(vocab={name: at for at, name in enumerate(names)}).save_pretrained(
        folder / "plain"
    )
    with pytest.MonkeyPatch.context() as patch:
        # Writing the model's card, the library asks its hub about whoever calls it.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        SentenceTransformer(str(folder / "plain"), device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def scored(
    selector: Embed, texts: list[str] | list[Document], targets: list[Target], folder: Path
) -> NDArray[np.float64]:
    corpus = ListedCorpus(texts)
    selector.prepare(corpus, targets, folder, lambda line: None)
    selector.open(folder, targets)
    return selector.score(corpus.documents)[0]


def naive_bert(folder: Path, text: str, longest: int = 256) -> NDArray[np.float64]:
    """Mean of the last layer over a text's tokens, without sentence-transformers."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(
        text, return_tensors="pt", truncation=True, max_length=min(longest, 128)
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**ids).last_hidden_state[0]
    return np.asarray(states.double().mean(dim=0))


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5))


@pytest.mark.parametrize("examples", ["mean", "joined"])
def test_cosines_of_a_model_are_the_dense_ones(bert: Path, tmp_path: Path, examples: str) -> None:
    texts = ["W1, w2 w3!", "w4", "w5 w6\nw7 w8 w9 w10", " ".join(["w11 w12"] * 80)]
    asked = [["w1 w2", "W3 w4."], ["w20 w21 w22"]]
    targets = [target(str(at), *one) for at, one in enumerate(asked)]
    selector = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"), examples=examples)
    found = scored(selector, [*texts, "", "?!"], targets, tmp_path)
    for row, text in enumerate(texts):
        ours = naive_bert(bert, prepare(text))
        for column, one in enumerate(asked):
            whole = one if examples == "mean" else [" ".join(one)]
            theirs = [cosine(ours, naive_bert(bert, prepare(example))) for example in whole]
            assert found[row, column] == pytest.approx(np.mean(theirs), abs=1e-6)
    assert np.isnan(found[4:]).all()


def test_settings_of_a_model_decide(bert: Path, tmp_path: Path) -> None:
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9"]
    targets = [target("t", "w1, w7 w8")]
    plain = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"))
    expected = scored(plain, texts, targets, tmp_path / "plain")
    short = Embed(encoder=SentenceEncoder(folder=bert, max_length=4, device="cpu"))
    cut = scored(short, texts, targets, tmp_path / "short")[0, 0]
    at_two = [naive_bert(bert, one, 4) for one in (texts[0], "w1 w7 w8")]
    assert cut == pytest.approx(cosine(*at_two), abs=1e-6)
    assert abs(cut - expected[0, 0]) > 1e-4
    raw = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"), text="raw")
    as_is = scored(raw, texts, targets, tmp_path / "raw")[0, 0]
    both = naive_bert(bert, texts[0]), naive_bert(bert, "w1, w7 w8")
    assert as_is == pytest.approx(cosine(*both), abs=1e-6)
    assert abs(as_is - expected[0, 0]) > 1e-4
    half = Embed(encoder=SentenceEncoder(folder=bert, device="cpu", dtype="bf16"))
    rough = scored(half, texts, targets, tmp_path / "half")
    assert 0 < np.abs(rough - expected).max() < 0.05
    for other in (short, raw, half):
        assert other.parameters() != plain.parameters()


def test_batches_make_no_difference_beyond_rounding(bert: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{at}" for at in rng.integers(0, 400, size)) for size in range(1, 60)]
    targets = [target("t", "w1 w2", "w3")]
    for name, encoder in _encoders(bert).items():
        selector = Embed(encoder=encoder)
        whole = scored(selector, texts, targets, tmp_path / name)
        documents = ListedCorpus(texts).documents
        alone = np.concatenate([selector.score([one])[0] for one in documents])
        np.testing.assert_allclose(alone, whole, atol=1e-6)
        again = scored(Embed(encoder=_encoders(bert)[name]), texts, targets, tmp_path / f"{name}2")
        np.testing.assert_array_equal(again, whole)
        assert selector.score([])[0].shape == (0, 1)
        assert selector.score([document("")])[1] == Cost()


def _encoders(bert: Path) -> dict[str, Encoder]:
    return {
        "lsa": LsaEncoder(dimensions=16, features=1024),
        "bert": SentenceEncoder(folder=bert, batch_size=8, device="cpu"),
    }


def test_an_encoders_price_is_what_torch_counts(bert: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder(folder=bert, device="cpu")
    encoder.open(tmp_path)
    # The fused kernel of the CPU is not among those that torch counts.
    encoder._model[0].auto_model.set_attn_implementation("eager")
    for lengths in ([5], [5, 5, 5], [40, 40]):
        texts = [" ".join(f"w{at}" for at in range(length - 2)) for length in lengths]
        with FlopCounterMode(display=False) as counter:
            _, cost = encoder.encode(texts)
        assert cost.tokens == sum(lengths)
        assert cost.flops == counter.get_total_flops()
    by_hand = 2 * LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INNER) * 80 + 2 * 2 * HIDDEN**2
    assert cost.flops == by_hand + 4 * LAYERS * HIDDEN * (40**2 + 40**2)


def test_targets_are_paid_for_once(bert: Path, tmp_path: Path) -> None:
    selector = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"))
    targets = [target("t", "w1 w2", "w3"), target("u", "w4")]
    corpus = ListedCorpus(["w1"])
    first = selector.prepare(corpus, targets, tmp_path, print)
    assert first.tokens == (2 + 2) + (1 + 2) + (1 + 2)
    assert first.flops > 0
    again = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"))
    assert again.prepare(corpus, targets, tmp_path, print) == first
    assert again.encoder._model is None, "nothing is embedded again"  # type: ignore[attr-defined]


def test_another_model_is_told_apart(bert: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bert, copy)
    facts = SentenceEncoder(folder=copy).parameters()
    assert facts == SentenceEncoder(folder=bert).parameters()
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "pooling_mode": "cls"}))
    assert facts != SentenceEncoder(folder=copy).parameters()


def test_vectors_of_lsa_are_the_dense_ones(tmp_path: Path) -> None:
    texts, _, examples = mixed_corpus(seed=3, documents=60)
    encoder = LsaEncoder(dimensions=10, features=256, seed=5)
    found = scored(Embed(encoder=encoder), texts, [target("t", *examples[:3])], tmp_path)

    def counts(of: list[str]) -> Any:
        hashing = HashingVectorizer(
            n_features=256, alternate_sign=False, norm=None, token_pattern=r"\S+"
        )
        return hashing.transform(of).toarray()

    def weighted(of: list[str]) -> NDArray[np.float64]:
        numbers = counts(of)
        having = (counts(texts) > 0).sum(axis=0)
        idf = np.log((1 + len(texts)) / (1 + having)) + 1
        with np.errstate(divide="ignore"):
            rows = np.where(numbers > 0, 1 + np.log(numbers), 0) * idf
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    used = counts(texts).sum(axis=0) > 0
    svd = TruncatedSVD(10, random_state=5).fit(weighted(texts)[:, used])
    ours, theirs = (weighted(of)[:, used] @ svd.components_.T for of in (texts, examples[:3]))
    expected = [np.mean([cosine(one, other) for other in theirs]) for one in ours]
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-8)


def test_settings_of_lsa_decide(tmp_path: Path) -> None:
    texts, _, examples = mixed_corpus(seed=4, documents=80)
    targets = [target("t", *examples)]
    plain = Embed(encoder=LsaEncoder(dimensions=8, features=512))
    expected = scored(plain, texts, targets, tmp_path / "plain")
    for name, value in {"dimensions": 4, "features": 64, "documents": 20, "seed": 1}.items():
        other = Embed(encoder=LsaEncoder(**{"dimensions": 8, "features": 512, name: value}))
        found = scored(other, texts, targets, tmp_path / name)
        assert np.abs(found - expected).max() > 1e-9, name
        assert other.parameters() != plain.parameters()


def test_lsa_on_little(tmp_path: Path) -> None:
    found = scored(
        Embed(encoder=LsaEncoder()), ["apple pie", "plum"], [target("t", "apple")], tmp_path
    )
    assert found[0, 0] > 0.99
    assert found[1, 0] < 0.01
    unknown = Embed(encoder=LsaEncoder())
    unknown.prepare(ListedCorpus(["apple"]), [target("t", "apple")], tmp_path / "one", print)
    unknown.open(tmp_path / "one", [])
    scores, cost = unknown.score([document("apple"), document("pear")])
    np.testing.assert_allclose(scores[:, 0], [1.0, 0.0], atol=1e-12)
    assert cost == Cost()
    with pytest.raises(DataError, match="no document of the corpus has a word"):
        scored(Embed(encoder=LsaEncoder()), ["", " "], [target("t", "a")], tmp_path / "none")


@pytest.mark.parametrize(("size", "most"), [(7, 3), (1000, 4), (3, 10), (600, 5)])
def test_a_sample_is_taken_at_even_distances(size: int, most: int) -> None:
    corpus = ListedCorpus([str(at) for at in range(size)])
    found = [one.number for one in sample(corpus, most)]
    assert len(found) == min(size, most)
    gaps = np.diff([*found, size])
    assert found[0] == 0
    assert gaps.max() - gaps.min() <= 1
    if size > 50 * most:
        assert corpus.read_from == found, "what lies between is not read"


def test_what_of_a_chat_is_embedded(tmp_path: Path) -> None:
    documents = [chat("apple pie", "pear tart"), chat("pear tart", "apple pie"), chat("fig", "fig")]
    pears = [target("t", "pear tart")]
    first = scored(Embed(encoder=LsaEncoder()), documents, pears, tmp_path / "first")
    whole = scored(Embed(encoder=LsaEncoder(), messages="all"), documents, pears, tmp_path / "all")
    assert first[1, 0] > 0.99 > 0.01 > first[0, 0]
    assert whole[0, 0] == pytest.approx(whole[1, 0])
    assert whole[0, 0] > 0.5


def test_the_targets_documents_are_found(bert: Path, tmp_path: Path) -> None:
    texts, is_target, examples = mixed_corpus(seed=1)
    found = scored(Embed(encoder=LsaEncoder()), texts, [target("t", *examples)], tmp_path / "lsa")
    assert precision(found[:, 0], is_target) > is_target.mean() + 0.5
    # Vectors of random weights all point nearly one way, which hides small differences.
    texts, is_target, examples = mixed_corpus(seed=1, strength=30)
    selector = Embed(encoder=SentenceEncoder(folder=bert, device="cpu"))
    found = scored(selector, texts, [target("t", *examples)], tmp_path / "bert")
    assert precision(found[:, 0], is_target) > is_target.mean() + 0.25


def test_flags_make_the_selector(bert: Path) -> None:
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)

    def made(flags: str) -> Embed:
        return embed.from_options(parser.parse_args(flags.split()))

    assert made("--model lsa") == Embed(encoder=LsaEncoder())
    assert made(
        "--model lsa --messages all --examples joined --aggregate max --text raw "
        "--lsa-dimensions 3 --lsa-features 9 --lsa-documents 5 --seed 2"
    ) == Embed(
        encoder=LsaEncoder(dimensions=3, features=9, documents=5, seed=2),
        messages="all",
        examples="joined",
        aggregate="max",
        text="raw",
    )
    flags = f"--model {bert} --max-length 9 --batch-size 2 --device cpu --dtype bf16"
    assert made(flags).encoder == SentenceEncoder(
        folder=bert, max_length=9, batch_size=2, device="cpu", dtype="bf16"
    )
    assert made(f"--model {bert}").encoder == SentenceEncoder(folder=bert)
    for flags, message in {
        "": "needs --model",
        "--model nowhere": "nowhere: no such folder",
        "--model lsaa": "did you mean 'lsa'",
        "--model lsa --lsa-features 8": "--lsa-dimensions 128",
        "--model lsa --max-length 9": "--max-length 9: it belongs to --model with a folder",
        "--model lsa --dtype bf16": "--dtype bf16: it belongs to",
        f"--model {bert} --seed 3": "--seed 3: it belongs to --model lsa",
    }.items():
        with pytest.raises(ConfigError, match=message):
            made(flags)


@pytest.mark.parametrize(
    ("module", "library"),
    [("sklearn", "scikit-learn"), ("sentence_transformers", "sentence-transformers")],
)
def test_a_library_that_is_not_there_is_named(
    module: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    embed.add_arguments(parser)
    monkeypatch.setitem(sys.modules, module, None)
    options = parser.parse_args(["--model", "lsa" if module == "sklearn" else str(tmp_path)])
    with pytest.raises(MissingExtraError, match=rf"{library}.*neomix\[select\]"):
        embed.from_options(options)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: sentence-transformers does not load it"):
        SentenceEncoder(folder=tmp_path / "empty", device="cpu").open(tmp_path)


def test_unit_vectors() -> None:
    found = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]])
