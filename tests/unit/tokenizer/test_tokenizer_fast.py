"""The fast encoder equals the library, or is not used."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.tokenizer import build_tokenizer
from megatron.tokenizer import fast as fast_module
from megatron.tokenizer.pattern import GPT2_PATTERN, NotUnderstoodError, PatternSplitter

INT32 = np.dtype("<i4")
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_LIKE = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SAMPLE = "It's we'LL  x=1234;\n\n\t漢字かな 12½ é e\u0301 ﬁ 👩‍👧 ſ 'ſ\u00a0\u2028z   "
EVERYTHING = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list(" \n\t'stlverd019aAzZ.,_=()é漢\u3000\u00a0")),
    ),
    max_size=120,
)
ADDED = [
    {"id": 2000, "content": "    ", "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": True, "special": False},
    {"id": 2001, "content": "  ", "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": True, "special": False},
    {"id": 2002, "content": "<|begin|>", "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": False, "special": True},
]  # fmt: skip


def split(*patterns: str) -> dict:
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": False}  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


def template(*pieces: str) -> dict:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }


VARIANTS = {
    "plain": {},
    "nfkc": {"normalizer": {"type": "NFKC"}},
    "nfd sequence": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFD"}]}
    },
    "prefix space": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                          "use_regex": True}
    },
    "cl100k": {"pre_tokenizer": split(CL100K)},
    "several splits": {"pre_tokenizer": split(*DEEPSEEK_LIKE)},
    "partial split": {"pre_tokenizer": split(r"\p{L}+")},
    "added": {"added": ADDED},
    "added and normalized": {"added": ADDED, "normalizer": {"type": "NFC"}},
    "template": {"post_processor": template("<|endoftext|>", "A", "<|endoftext|>")},
    "ignore merges": {"model": {"ignore_merges": True}},
}  # fmt: skip


def both(tokenizer, texts: list[str]) -> tuple[list, list]:
    return tokenizer.encode_raw(texts, INT32), tokenizer.encode_raw_by_library(texts, INT32)


@pytest.mark.parametrize("name", VARIANTS)
def test_fast_equals_library(name, variant, texts):
    tokenizer = build_tokenizer("HFTokenizer", str(variant(**VARIANTS[name])))
    assert tokenizer.encoder.startswith("fast"), tokenizer.encoder
    names = [t + " <|begin|>x    y  z<|endoftext|>" for t in texts[:3]]
    fast, library = both(tokenizer, [*texts, *names, SAMPLE])
    assert fast == library
    assert tokenizer.encoder.startswith("fast"), tokenizer.encoder


@pytest.mark.parametrize(
    "name", ["plain", "nfkc", "prefix space", "cl100k", "added and normalized"]
)
def test_fast_equals_library_on_any_text(name, variant):
    tokenizer = build_tokenizer("HFTokenizer", str(variant(**VARIANTS[name])))

    @settings(derandomize=True, max_examples=150, deadline=None)
    @given(EVERYTHING)
    def check(text):
        fast, library = both(tokenizer, [text])
        assert fast == library

    check()
    assert tokenizer.encoder.startswith("fast"), tokenizer.encoder


def test_every_assigned_character_in_either_role(tokenizer_file):
    """Each character after a letter, before a digit and alone: its class decides all three."""
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    rng = np.random.default_rng(0)
    points = [*range(0x80, 0x3400), *rng.integers(0x3400, 0xD800, 1500).tolist(),
              *range(0xE000, 0xE010), *range(0xF900, 0x10000),
              *rng.integers(0x10000, 0x32000, 3000).tolist(), *range(0xE0100, 0xE01F0)]  # fmt: skip
    texts = [
        "".join(f"a{chr(p)}1 {chr(p)}" for p in points[i : i + 500])
        for i in range(0, len(points), 500)
    ]
    fast, library = both(tokenizer, texts)
    assert fast == library


FALLBACKS = {
    "lowercase": ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    "digits": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": True},
                ],
            }
        },
        "Digits",
    ),
    "no byte level": ({"pre_tokenizer": {"type": "Whitespace"}}, "ByteLevel"),
    "stripping added token": ({"added": [{**ADDED[2], "lstrip": True}]}, "lstrip"),
    "byte fallback": ({"model": {"byte_fallback": True}}, "byte_fallback"),
    "behaviour": (
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed",
                     "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": True},
                ],
            }
        },
        "Split",
    ),
    "lookbehind": ({"pre_tokenizer": split(r"(?<=a)b|\s+|\S+")}, "(?<="),
    "line end": ({"pre_tokenizer": split(r"\p{L}+$|[\s\S]")}, "$"),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_understood_falls_back_and_says_why(name, variant, texts):
    parts, reason = FALLBACKS[name]
    tokenizer = build_tokenizer("HFTokenizer", str(variant(**parts)))
    assert tokenizer.encoder.startswith("tokenizers (")
    assert reason in tokenizer.encoder
    fast, library = both(tokenizer, texts)
    assert fast == library


def test_a_vocabulary_without_every_byte_falls_back(tokenizer_file, tmp_path, texts):
    content = json.loads(tokenizer_file.read_text())
    used = {part for merge in content["model"]["merges"] for part in merge}
    lone = next(c for c in "ĀāĂăĄąĆć" if c not in used)
    del content["model"]["vocab"][lone]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert "lacks 1 of the 256 bytes" in tokenizer.encoder
    fast, library = both(tokenizer, [*texts, "\x00\x01\x02\x03\x04\x05\x06\x07"])
    assert fast == library


def test_an_edited_vocabulary_falls_back(tokenizer_file, tmp_path, texts):
    """A merge moved behind others makes a token that its own text no longer encodes to."""
    content = json.loads(tokenizer_file.read_text())
    merges = content["model"]["merges"]
    words = ["".join(m) for m in merges]
    vocabulary = content["model"]["vocab"]
    # "ab" + "cd" for a word that is made as "a" + "bcd": never reached.
    vocabulary["qzqz"] = len(vocabulary)
    merges += [["q", "z"], ["z", "q"], ["q", "zq"], ["qzq", "z"]]
    for extra in ("qz", "zq", "qzq"):
        vocabulary.setdefault(extra, len(vocabulary))
    assert not {"qz", "zq", "qzq"} & set(words)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert "does not reach" in tokenizer.encoder
    fast, library = both(tokenizer, [*texts, "qzqz zqzq qzq qz"])
    assert fast == library


def test_merges_listed_in_every_split_of_a_token_are_understood(tokenizer_file, tmp_path, texts):
    """Converters from tiktoken list, for each token, every pair of tokens that spells it."""
    content = json.loads(tokenizer_file.read_text())
    vocabulary = content["model"]["vocab"]
    merges = []
    for left, right in content["model"]["merges"]:
        word = left + right
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        merges += [[a, b] for a, b in cuts if a in vocabulary and b in vocabulary]
    assert len(merges) > len(content["model"]["merges"])
    content["model"]["merges"] = merges
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert tokenizer.encoder.startswith("fast"), tokenizer.encoder
    fast, library = both(tokenizer, [*texts, SAMPLE])
    assert fast == library


@pytest.mark.parametrize("where", ["pattern", "vectorised"])
def test_a_wrong_splitter_is_noticed_and_not_used(where, variant, monkeypatch, texts):
    if where == "pattern":
        wrong = GPT2_PATTERN.replace("|'ll", "")
        monkeypatch.setattr("megatron.tokenizer.pattern._GPT2_FAST", wrong)
    else:
        monkeypatch.setattr("megatron.tokenizer.vectorised._TWO_LETTERS", (b"re", b"ve"))
    parts = VARIANTS["prefix space"] if where == "pattern" else {}
    tokenizer = build_tokenizer("HFTokenizer", str(variant(**parts)))
    assert "differs on" in tokenizer.encoder
    fast, library = both(tokenizer, texts)
    assert fast == library


def test_a_difference_beyond_ascii_is_noticed_before_it_is_written(tmp_path, monkeypatch, texts):
    from megatron.tokenizer import pattern
    from megatron.tokenizer.train import train_byte_level_bpe

    tokenizer_file = tmp_path / "greek.json"
    train_byte_level_bpe(["Ελληνικά και άλλα Ελληνικά"] * 9, tokenizer_file, vocab_size=400)

    real = pattern.class_ranges

    def without_greek(escape, end):
        return tuple(r for r in real(escape, end) if not (r[0] <= 0x391 < r[1]))

    monkeypatch.setattr(pattern, "class_ranges", without_greek)
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    assert tokenizer.encoder.startswith("fast")
    fast, library = both(tokenizer, [*texts, "Ελληνικά"])
    assert fast == library
    assert "differs on" in tokenizer.encoder


def test_without_tiktoken_the_library_merges(tokenizer_file, monkeypatch, texts):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    assert "merging by tokenizers" in tokenizer.encoder
    fast, library = both(tokenizer, [*texts, SAMPLE])
    assert fast == library


def test_a_full_cache_is_emptied_and_changes_nothing(tokenizer_file, texts, monkeypatch):
    monkeypatch.setattr(fast_module, "_CACHE_PIECES", 7)
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    encoder, _ = tokenizer._bulk
    encoder._cache_pieces = 7
    encoder._caches.clear()
    fast, library = both(tokenizer, texts)
    assert fast == library
    assert all(len(cache) <= 7 for cache in encoder._caches.values())


def test_both_token_types_hold_the_same_ids(tokenizer_file, texts):
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    wide = tokenizer.encode_raw(texts, INT32)
    narrow = tokenizer.encode_raw(texts, np.dtype("<u2"))
    for a, b in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(np.frombuffer(a, INT32), np.frombuffer(b, "<u2"))


@pytest.mark.parametrize(
    "pattern",
    [GPT2_PATTERN, CL100K, *DEEPSEEK_LIKE, r"[A-Za-z]+?x|\p{Lu}|\P{L}", r"(ab|a)+|[^\S\r\n]{2,}"],
)
def test_splitting_equals_the_library(pattern, texts):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    library = Split(Regex(pattern), "isolated")
    ours = PatternSplitter(pattern) if r"[^\S" not in pattern else None
    if ours is None:
        with pytest.raises(NotUnderstoodError):
            PatternSplitter(pattern)
        return
    for text in [*texts, SAMPLE]:
        assert ours.for_text(text)(text) == [piece for piece, _ in library.pre_tokenize_str(text)]
