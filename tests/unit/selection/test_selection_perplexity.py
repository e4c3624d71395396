"""Perplexities against transformers' own losses, one document and one window at a time."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import local_tasks, runs
from support.exchange import LLAMA, NEOX
from support.selecting import Made, document, make_models, quiet
from support.store import made_up_losses, write_store

from megatron.data.domain import open_domain
from megatron.errors import ConfigError, DataError, RunError
from megatron.selection import perplexity
from megatron.selection.inputs import Inputs, open_corpus
from megatron.selection.perplexity import Perplexity
from megatron.selection.windows import fitted, windows
from megatron.tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")

NEOX_MODEL = {**NEOX, "gpt_j_residual": True, "rotary_pct": 0.25, "no_weight_tying": True}
WINDOW, STRIDE = 24, 7


@pytest.fixture(scope="module", params=["neox", "llama"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make_models(folder, NEOX_MODEL if request.param == "neox" else LLAMA)


def texts() -> list[Any]:
    lengths = (3, 200, 1, 12, 90, 40, 7)
    made = [document(n, local_tasks.text(n, words)) for n, words in enumerate(lengths)]
    made.append(document(7, ""))
    made.append(document(8, "", ("system", "be brief"), ("user", "ab cab?"), ("assistant", "bad")))
    made.append(document(9, "x"))
    return made


def scored(given: Path, folder: Path, documents: list[Any], **options: Any) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    selector = Perplexity(model=str(given), device="cpu", **options)
    selector.prepare(Made(documents), (), folder, quiet)
    selector.open(folder, ())
    return selector.score(documents)[0][:, 0]


def reference(folder: Path, text: str, *, window: int, stride: int, bos: bool) -> float:
    """Hugging Face's recipe: every window's own loss, weighted by the targets that it has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids.long()
    if bos:
        first = tokenizer.bos_token_id
        ids = torch.cat(
            [torch.tensor([[tokenizer.eos_token_id if first is None else first]]), ids], 1
        )
    done, total, count = 0, 0.0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + window, ids.size(1))
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : -(end - done)] = -100
        targets = int((labels[:, 1:] != -100).sum())
        if targets:
            with torch.no_grad():
                total += model(part, labels=labels).loss.item() * targets
            count += targets
        done = end
        if end == ids.size(1):
            break
    return total / count if count else float("nan")


@pytest.mark.parametrize("bos", [False, True])
def test_both_back_ends_give_transformers_losses(models, tmp_path, bos):
    ours, hf = models
    documents = texts()
    options = {"window": WINDOW, "stride": STRIDE, "bos": bos}
    found = {
        name: scored(given, tmp_path / name, documents, **options)
        for name, given in (("ours", ours), ("hf", hf))
    }
    plain = [one.text for one in documents]
    plain[8] = "be brief\nab cab? A:bad"
    for number, text in enumerate(plain):
        bare = float("nan")
        expected = reference(hf, text, window=WINDOW, stride=STRIDE, bos=bos) if text else bare
        for kind in found.values():
            assert kind[number] == pytest.approx(expected, abs=1e-4, nan_ok=True)
    # Empty is empty; a single token is predicted from the first token alone.
    assert np.isnan(found["hf"][[7, 9]]).tolist() == [True, not bos]
    assert np.nanstd(found["hf"]) > 0.05


def test_no_score_depends_on_the_batch(models, tmp_path):
    documents = texts()
    for number, given in enumerate(models):
        selector = Perplexity(model=str(given), device="cpu", window=WINDOW, stride=STRIDE)
        selector.prepare(Made(documents), (), tmp_path, quiet)
        selector.open(tmp_path, ())
        together, cost = selector.score(documents)
        alone = [selector.score([one]) for one in documents]
        assert np.allclose(
            together[:, 0], [one[0, 0] for one, _ in alone], atol=2e-6, equal_nan=True
        )
        assert sum(one.tokens for _, one in alone) == cost.tokens
        assert cost.flops == pytest.approx(sum(one.flops for _, one in alone))
        one_row = scored(
            given, tmp_path, documents, window=WINDOW, stride=STRIDE, batch_tokens=1 + number
        )
        assert np.allclose(together[:, 0], one_row, atol=2e-6, equal_nan=True)


def test_cost_counts_what_is_read_again(models, tmp_path):
    documents = [texts()[1]]
    costs = []
    for given in models:
        selector = Perplexity(model=str(given), device="cpu", window=WINDOW, stride=STRIDE)
        selector.prepare(Made(documents), (), tmp_path, quiet)
        selector.open(tmp_path, ())
        costs.append(selector.score(documents)[1])
    length = len(
        transformers.AutoTokenizer.from_pretrained(models[1])(documents[0].text)["input_ids"]
    )
    read = sum(one.read for one in windows(length, size=WINDOW, stride=STRIDE))
    assert read > 2.5 * length
    assert [one.tokens for one in costs] == [read, read]
    # Ours counts the rows that pad the vocabulary (304 of 300), training's formula.
    assert costs[0].flops == pytest.approx(costs[1].flops, rel=0.01)
    assert costs[1].flops == pytest.approx(2 * read * 30_000, rel=0.5)


def test_tokens_of_the_same_tokenizer_are_read_as_they_are(models, tmp_path):
    ours, hf = models
    from megatron.selection.model_folder import tokenizer_identity

    text = texts()[1]
    ids = transformers.AutoTokenizer.from_pretrained(hf)(texts()[4].text)["input_ids"]
    same = replace(text, tokens=np.array(ids, dtype=np.uint16))
    for given in (ours, hf):
        plain = scored(given, tmp_path, [text, texts()[4]])
        name = "0" * 64
        other = scored(given, tmp_path, [replace(same, tokenizer=name)])
        assert other[0] == pytest.approx(plain[0], abs=1e-6)
    known = replace(same, tokenizer=tokenizer_identity(hf))
    assert scored(hf, tmp_path, [known])[0] == pytest.approx(plain[1], abs=1e-6)
    with pytest.raises(DataError, match=r"token id 299|token id 400"):
        scored(hf, tmp_path, [replace(known, tokens=np.array([1, 400]))])


def test_windows_predict_every_token_once_with_context():
    for length in (0, 1, 2, 23, 24, 25, 31, 32, 200):
        found = list(windows(length, size=WINDOW, stride=STRIDE))
        predicted = [n for one in found for n in range(one.first, one.stop)]
        assert predicted == list(range(1, length))
        for one in found[1:]:
            assert one.first - one.start >= WINDOW - STRIDE
            assert one.stop - one.start <= WINDOW
    assert fitted(2048, 512, 1024) == (1024, 256)
    assert fitted(2048, 512, None) == fitted(2048, 512, 4096) == (2048, 512)
    for size, stride in ((1, 1), (24, 24), (24, 0)):
        with pytest.raises(ConfigError, match=r"--window|--stride"):
            fitted(size, stride, None)


def test_what_is_given_decides(models, tmp_path):
    ours, hf = models
    parser = argparse.ArgumentParser()
    perplexity.add_arguments(parser)
    options = parser.parse_args(
        ["--model", str(hf), "--window", "24", "--stride", "5", "--bos", "--device", "cpu"]
    )
    selector = perplexity.from_options(options)
    facts = selector.parameters()
    assert (facts["window"], facts["stride"], facts["bos"]) == (24, 5, True)
    assert facts["model"] != Perplexity(model=str(ours)).parameters()["model"]
    assert Perplexity(model=f"{ours},7").parameters() == Perplexity(model=str(ours)).parameters()
    with pytest.raises(ConfigError, match="either --model"):
        Perplexity()
    with pytest.raises(ConfigError, match="--window 24: it belongs to --model"):
        perplexity.from_options(parser.parse_args(["--losses", "store", "--window", "24"]))
    with pytest.raises(DataError, match="no such folder"):
        Perplexity(model=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no GPU"):
        Perplexity(model=str(hf), device="cuda:7").prepare(Made([]), (), tmp_path, quiet)
    selector = Perplexity(model=str(hf), device="cpu")
    selector.open(tmp_path, ())
    assert selector._model is not None

    def no_room(rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    selector._model.token_losses = no_room  # type: ignore[method-assign]
    with pytest.raises(RunError, match="smaller --batch-tokens"):
        selector.score(texts())
    half = scored(hf, tmp_path, texts(), dtype="bf16")
    full = scored(hf, tmp_path, texts())
    assert np.nanmax(np.abs(half - full)) > 1e-4
    assert np.allclose(half, full, atol=0.2, equal_nan=True)


def test_a_loss_store_gives_each_document_its_own_tokens_losses(tmp_path):
    runs.make_data(tmp_path / "data", documents=40)
    walk, drift, noise = (str(tmp_path / "data" / name) for name in ("walk", "drift", "noise"))
    split = "60,40,0"
    domains = [
        open_domain("walk", [walk, drift], seq_length=16, seed=1, split=(split, "train"),
                    epoch_offset=False),
        open_domain("noise", [noise], seq_length=16, seed=1, epoch_offset=False),
    ]  # fmt: skip
    write_store(tmp_path / "store", domains, split=split, vocab_size=128)
    characters = build_tokenizer("CharLevelTokenizer")
    corpus = open_corpus(Inputs(words=(walk, drift)), tokenizer=characters)
    selector = Perplexity(losses=str(tmp_path / "store"))
    selector.prepare(corpus, (), tmp_path / "work", quiet)
    selector.open(tmp_path / "work", ())
    documents = list(corpus.read())
    found, cost = selector.score(documents)
    assert cost.tokens == 0
    assert len(selector.parameters()["losses"]) == 64
    # Of each token the made-up loss, but for the stream's first and what no window reaches.
    of_token = made_up_losses()["walk"].astype(np.float64)
    train = [source.documents.last for source in domains[0].sources]
    assert all(0 < last < 40 for last in train)
    inside = 0
    for one, score in zip(documents, found[:, 0], strict=True):
        last = train[0] if one.source == "walk" else train[1]
        if one.number >= last:
            assert np.isnan(score)
            continue
        losses = of_token[np.asarray(one.tokens, dtype=np.int64)[1:]]
        if one.number == last - 1:
            # The remainder of a stream fills no window.
            reached = [
                np.isclose(score, losses[:n].mean(), atol=1e-9) for n in range(1, len(losses) + 1)
            ]
            assert any(reached) or np.isnan(score)
        else:
            assert score == pytest.approx(losses.mean(), abs=1e-9)
            inside += 1
    assert inside > 30
    with pytest.raises(DataError, match="no losses of the documents of drift"):
        selector.prepare(
            open_corpus(Inputs(words=(drift,)), tokenizer=characters), (), tmp_path, quiet
        )
    with pytest.raises(ConfigError, match="--bos"):
        Perplexity(losses=str(tmp_path / "store"), bos=True)
