"""A run's tokenizer as transformers loads it, and a folder's tokenizer as a run loads it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support import exchange
from support.exchange import NEOX

from megatron.config import TokenizerConfig
from megatron.errors import DataError
from megatron.exchange.export import ExportOptions, export
from megatron.exchange.hf_import import import_hugging_face
from megatron.exchange.source import find_source
from megatron.exchange.tokenizer_files import open_tokenizer, write_tokenizer
from megatron.tokenizer import TOKENIZER_TYPES
from megatron.tokenizer.train import train_byte_level_bpe

transformers = pytest.importorskip("transformers")
TEXTS = ["the cat and the dog", " Größe\n\tdef f(): return 数学 🙂", "<|endoftext|>a"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tokenizer.json, and GPT-2's pair of files with the same merges."""
    folder = tmp_path_factory.mktemp("vocabulary")
    corpus = ["the cat and the dog and the bird said that the day was good"] * 20
    train_byte_level_bpe(corpus, folder / "own.json", vocab_size=300)
    model = json.loads((folder / "own.json").read_text())["model"]
    ids = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    ids = ids if "<|endoftext|>" not in model["vocab"] else model["vocab"]
    (folder / "vocab.json").write_text(json.dumps(ids))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    import sentencepiece

    text = folder / "corpus.txt"
    text.write_text("\n".join([*corpus, "Größe 数学 def f(): return"] * 20))
    for name, rule in (("spm", "identity"), ("folded", "nmt_nfkc")):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / name), vocab_size=320, model_type="bpe",
            byte_fallback=True, minloglevel=2, normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
        )  # fmt: skip
    ranks = [bytes((b,)) for b in range(256)] + [b"re", b"in", b" x", b"def", b"de", b" the"]
    (folder / "x.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))
    )
    return folder


def settings(kind: str, folder: Path) -> TokenizerConfig:
    files = {
        "HFTokenizer": {"vocab_file": str(folder / "own.json")},
        "GPT2BPETokenizer": {
            "vocab_file": str(folder / "vocab.json"),
            "merge_file": str(folder / "merges.txt"),
        },
        "HFGPT2Tokenizer": {"vocab_file": str(folder)},
        "SPMTokenizer": {"vocab_file": str(folder / "spm.model")},
        "TiktokenTokenizer": {"vocab_file": str(folder / "x.tiktoken")},
        "CharLevelTokenizer": {},
    }[kind]
    return TokenizerConfig(tokenizer_type=kind, **files)


@pytest.mark.parametrize("kind", TOKENIZER_TYPES)
def test_the_ids_are_ours(tmp_path: Path, vocabulary: Path, kind: str) -> None:
    chosen = settings(kind, vocabulary)
    tokenizer = open_tokenizer(chosen)
    assert tokenizer is not None
    write_tokenizer(tmp_path, chosen, tokenizer, pad=5, length=24)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids).strip() == tokenizer.decode(ids).strip()
    assert theirs.pad_token_id == 5
    assert theirs.model_max_length == 24
    if kind != "CharLevelTokenizer":
        assert theirs.eos_token_id == tokenizer.eod


def test_a_form_that_gives_other_ids_is_refused(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("HFTokenizer", vocabulary)
    tokenizer = open_tokenizer(chosen)
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer, "encode", lambda _: [1, 2])
    with pytest.raises(DataError, match="--no_save_tokenizer"):
        write_tokenizer(tmp_path, chosen, tokenizer, pad=None, length=24)
    # A sentencepiece model that folds white space: Llama's tokenizer does not.
    folded = TokenizerConfig(
        tokenizer_type="SPMTokenizer", vocab_file=str(vocabulary / "folded.model")
    )
    other = open_tokenizer(folded)
    assert other is not None
    with pytest.raises(DataError, match="gives other ids than SPMTokenizer"):
        write_tokenizer(tmp_path, folded, other, pad=None, length=24)


def test_it_goes_along_both_ways(tmp_path: Path, vocabulary: Path) -> None:
    keys: dict[str, Any] = {**NEOX, "vocab_size": 300}
    keys |= settings("HFTokenizer", vocabulary).model_dump(exclude_none=True)
    model = exchange.config(tmp_path / "run", keys).model
    exchange.save(tmp_path / "run", keys, exchange.random_weights(model))
    source = find_source(tmp_path / "run", step=None, say=print)
    export(source, tmp_path / "hf", ExportOptions(pad=5), say=print)
    export(source, tmp_path / "bare", ExportOptions(tokenizer=False), say=print)
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    eod = open_tokenizer(source.tokenizer).eod  # type: ignore[union-attr]
    for one in (config, generation):
        assert (one["eos_token_id"], one["bos_token_id"], one["pad_token_id"]) == (eod, eod, 5)

    import_hugging_face(tmp_path / "hf", tmp_path / "ours", say=print)
    again = find_source(tmp_path / "ours", step=None, say=print)
    assert again.tokenizer.vocab_file == str(tmp_path / "ours/tokenizer/tokenizer.json")
    own, back = open_tokenizer(source.tokenizer), open_tokenizer(again.tokenizer)
    assert own is not None
    assert back is not None
    assert [own.encode(text) for text in TEXTS] == [back.encode(text) for text in TEXTS]
    # What transformers keeps beside it (which tokens are special) goes along, too.
    export(again, tmp_path / "hf2", ExportOptions(), say=print)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf2")
    assert (theirs.pad_token_id, theirs.eos_token_id) == (5, eod)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [own.encode(text) for text in TEXTS]
