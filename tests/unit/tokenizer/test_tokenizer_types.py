"""Every tokenizer type: ids, end of document, round trip, and what a user gets wrong."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import ConfigError, DataError
from megatron.tokenizer import TOKENIZER_TYPES, build_tokenizer
from megatron.tokenizer.train import train_byte_level_bpe

TEXT = "def f(x):\n    return x  # naïve 漢字 👩‍👧\n"


@pytest.fixture(scope="session")
def files(tokenizer_file: Path, texts: list[str], tmp_path_factory) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("types")
    model = json.loads(tokenizer_file.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    import sentencepiece
    from tokenizers.pre_tokenizers import ByteLevel

    (folder / "corpus.txt").write_text("\n".join("\n".join(texts).splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2, user_defined_symbols=["<|endoftext|>"],
        character_coverage=0.98,
    )  # fmt: skip
    ranks = [bytes((b,)) for b in range(256)] + [b"re", b"in", b" x", b"def", b"de"]
    (folder / "x.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))
    )
    assert len(ByteLevel.alphabet()) == 256
    return {
        "HFTokenizer": (str(tokenizer_file),),
        "GPT2BPETokenizer": (str(folder / "vocab.json"), str(folder / "merges.txt")),
        "HFGPT2Tokenizer": (str(folder),),
        "SPMTokenizer": (str(folder / "spm.model"),),
        "TiktokenTokenizer": (str(folder / "x.tiktoken"),),
        "CharLevelTokenizer": (),
    }


@pytest.mark.parametrize("kind", TOKENIZER_TYPES)
def test_every_type_encodes_and_decodes(kind, files):
    tokenizer = build_tokenizer(kind, *files[kind])
    assert tokenizer.name == kind
    ids = tokenizer.encode(TEXT)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    decoded = tokenizer.decode(ids)
    if kind == "SPMTokenizer":  # sentencepiece itself folds white space
        decoded, expected = decoded.split(), TEXT.split()
    else:
        expected = TEXT
    assert decoded == expected
    assert len(tokenizer.sha256) == 64
    batch = tokenizer.encode_batch([TEXT, "", "x"])
    assert [b.tolist() for b in batch] == [ids, tokenizer.encode(""), tokenizer.encode("x")]
    raw = tokenizer.encode_raw([TEXT], np.dtype("<i4"))[0]
    assert np.frombuffer(raw, "<i4").tolist() == ids


@pytest.mark.parametrize("kind", TOKENIZER_TYPES)
def test_the_type_is_found_in_any_case(kind, files):
    assert build_tokenizer(kind.lower(), *files[kind]).name == kind


def test_gpt2_files_and_tokenizer_json_agree(files):
    ours = build_tokenizer("GPT2BPETokenizer", *files["GPT2BPETokenizer"])
    other = build_tokenizer("HFTokenizer", *files["HFTokenizer"])
    assert ours.encoder.startswith("fast"), ours.encoder
    text = TEXT + "<|endoftext|>"
    assert ours.encode(text) == other.encode(text)
    assert ours.eod == other.eod == ours.encode("<|endoftext|>")[0]


def test_gpt2_files_agree_with_transformers(files, texts):
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2TokenizerFast(*files["GPT2BPETokenizer"])
    ours = build_tokenizer("GPT2BPETokenizer", *files["GPT2BPETokenizer"])
    for text, raw in zip(texts, ours.encode_batch(texts), strict=True):
        if "<|padding|>" not in text:  # not a name in GPT-2's own files
            assert raw.tolist() == reference.encode(text)


def test_hfgpt2_adds_padding_and_counts_it(files):
    tokenizer = build_tokenizer("HFGPT2Tokenizer", *files["HFGPT2Tokenizer"])
    assert tokenizer.vocab_size == 2000  # "<|padding|>" was there already
    assert len(tokenizer.encode("a<|padding|>b")) == 3


def test_byte_tokenizer_is_neoxs():
    tokenizer = build_tokenizer("CharLevelTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod) == (512, 0)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


def test_tiktoken_merges_by_rank_and_knows_the_end(files):
    tokenizer = build_tokenizer("TiktokenTokenizer", *files["TiktokenTokenizer"])
    assert tokenizer.encode("def") == [259]
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eod] == [261]


def test_sentencepiece_without_the_name_takes_its_own_end(texts, tmp_path):
    import sentencepiece

    (tmp_path / "c.txt").write_text("\n".join("\n".join(texts).splitlines()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "c.txt"), model_prefix=str(tmp_path / "m"), vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2, character_coverage=0.98,
    )  # fmt: skip
    tokenizer = build_tokenizer("SPMTokenizer", str(tmp_path / "m.model"))
    assert tokenizer.eod == 2  # </s>


def test_padding_and_truncation_of_a_file_are_not_applied(variant):
    path = variant(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"},
    )  # fmt: skip
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("x") == [tokenizer.encode("x")[0]]


def test_the_hash_tells_files_apart(files, variant):
    one = build_tokenizer("HFTokenizer", *files["HFTokenizer"])
    other = build_tokenizer("HFTokenizer", str(variant(normalizer={"type": "NFC"})))
    assert one.sha256 != other.sha256


@pytest.mark.parametrize(
    ("kind", "arguments", "parts"),
    [
        ("HFTokenizer", (), ["HFTokenizer", "--vocab-file"]),
        ("HFTokenizer", ("{tmp}/no.json",), ["no.json", "no such file"]),
        ("HFTokenizer", ("{tmp}/bad.json",), ["bad.json", "not a tokenizer.json"]),
        ("HFTokenizer", ("{tmp}/empty.json",), ["empty.json", "empty file"]),
        ("HFTokenizer", ("{tmp}",), ["cannot be read"]),
        ("GPT2BPETokenizer", ("{tmp}/bad.json",), ["--merge-file"]),
        ("GPT2BPETokenizer", ("{tmp}/bad.json", "{tmp}/bad.json"), ["not a GPT-2 vocabulary"]),
        ("SPMTokenizer", ("{tmp}/bad.json",), ["not a sentencepiece model"]),
        ("TiktokenTokenizer", ("cl100k_bose",), ["did you mean 'cl100k_base'"]),
        ("TiktokenTokenizer", ("{tmp}/bad.json",), ["line 1", "not a .tiktoken file"]),
        ("TiktokenTokenizer", (), ["TiktokenTokenizer", "--vocab-file"]),
        ("HFGPT2Tokenizer", ("{tmp}",), ["vocab.json"]),
    ],
)
def test_a_wrong_file_is_one_clear_message(kind, arguments, parts, tmp_path):
    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DataError) as raised:
        build_tokenizer(kind, *[a.format(tmp=tmp_path) for a in arguments])
    for part in parts:
        assert part in str(raised.value)


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'HFTokenizer'"):
        build_tokenizer("HFTokeniser", "x")


def test_no_end_of_document_token_is_told_only_when_needed(tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text())
    content["added_tokens"] = []
    for name in ("<|endoftext|>", "<|padding|>"):
        content["model"]["vocab"][name.replace("|", "!")] = content["model"]["vocab"].pop(name)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert tokenizer.encode("x")
    with pytest.raises(DataError, match="no end-of-document token"):
        _ = tokenizer.eod


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece", "tiktoken"])
def test_a_missing_library_names_its_extra(library, files, monkeypatch):
    kind = {"tokenizers": "HFTokenizer", "sentencepiece": "SPMTokenizer"}.get(
        library, "TiktokenTokenizer"
    )
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Exception, match=r"neomix\[train\]"):
        build_tokenizer(kind, *files[kind])


def test_importing_the_package_loads_no_tokenizer_library():
    code = (
        "import sys, megatron.tokenizer; heavy = ('tokenizers', 'tiktoken', 'sentencepiece', "
        "'torch'); print([m for m in heavy if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_training_is_reproducible_and_covers_all_bytes(texts, tmp_path):
    sizes = [train_byte_level_bpe(texts, tmp_path / f"{i}.json", vocab_size=600) for i in (1, 2)]
    assert sizes == [600, 600]
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    tokenizer = build_tokenizer("HFTokenizer", str(tmp_path / "1.json"))
    anything = "".join(map(chr, range(1, 0x250))) + "\U0001f600"
    assert tokenizer.decode(tokenizer.encode(anything)) == anything
    assert tokenizer.eod == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [({"vocab_size": 100}, "at least 258"), ({"normalizer": "NFX"}, "unknown normalizer 'NFX'")],
)
def test_training_refuses_what_cannot_be(options, part, texts, tmp_path):
    with pytest.raises(ConfigError, match=part):
        train_byte_level_bpe(texts, tmp_path / "t.json", **options)


def test_training_on_nothing_is_told(tmp_path):
    with pytest.raises(DataError, match="no text"):
        train_byte_level_bpe([], tmp_path / "t.json", vocab_size=300)
    assert not (tmp_path / "t.json").exists()
