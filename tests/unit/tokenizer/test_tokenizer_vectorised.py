"""Batches in NumPy: any texts, crowded tables, long texts, other characters in between."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.tokenizer import build_tokenizer, fast, vectorised
from megatron.tokenizer.pattern import GPT2_PATTERN, PatternSplitter

PIECES = st.sampled_from(
    [*"abcstmdrvl019'._-\"(){}\x1c\x7f", " ", "  ", "\n", "\n\n", "\t", "\r\n",
     "'s", "'ll", "'re",
     " 't", "''", "word", " word", "The", "é", "漢字", "\u00a0", "👍", "ſ", " a b", "x" * 17,
     "12345678", "twelve_bytes", "sixteen__bytes__", "<|endoftext|>", "\x00"]
)  # fmt: skip
TEXTS = st.lists(st.lists(PIECES, max_size=25).map("".join), max_size=8)


@pytest.fixture(params=["<u2", "<i4"])
def dtype(request) -> np.dtype:
    return np.dtype(request.param)


def test_any_batch_equals_the_library(tokenizer_file, dtype, monkeypatch):
    monkeypatch.setattr(vectorised, "_TABLE_BITS", 4)  # nearly every piece drives another out
    monkeypatch.setattr(vectorised, "_SHIFT", np.uint64(60))
    monkeypatch.setattr(fast, "BATCH_CHARACTERS", 40)
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))

    @settings(derandomize=True, max_examples=300, deadline=None)
    @given(TEXTS)
    def check(texts):
        assert tokenizer.encode_raw(texts, dtype) == tokenizer.encode_raw_by_library(texts, dtype)

    check()
    assert tokenizer.encoder.startswith("fast"), tokenizer.encoder


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=30).map("".join))
def test_pieces_are_those_of_the_pattern(text):
    """The marks alone, against the pattern, where the text is ASCII."""
    text = text.encode("ascii", "ignore").decode().replace("\0", "")
    if not text:
        return
    raw = (text + "\0").encode()
    data = np.frombuffer(raw, np.uint8)
    classes = np.frombuffer(raw.translate(vectorised._class_table()), np.uint8)
    starts = np.flatnonzero(vectorised._piece_starts(data, classes)).tolist()
    assert starts[-1] == len(text)
    found = [text[a:b] for a, b in itertools.pairwise(starts)]
    assert found == PatternSplitter(GPT2_PATTERN).ascii(text)


def test_every_pair_of_ascii_characters_between_words(tokenizer_file, dtype):
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    characters = [chr(c) for c in range(1, 128)]
    texts = [f"w{a}{b}w {a}{b} {b}" for a in characters for b in characters]
    assert tokenizer.encode_raw(texts, dtype) == tokenizer.encode_raw_by_library(texts, dtype)


def test_a_long_text_is_cut_where_pieces_start(tokenizer_file, texts, dtype, monkeypatch):
    monkeypatch.setattr(fast, "BATCH_CHARACTERS", 500)
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    long = ["\n".join(texts[:-1]) * 3, "é ".join(texts[:9]), "漢" * 5000, "x" * 5000, " " * 5000]
    assert len(list(fast._cut_at_words(long[0]))) > 20
    assert "".join(fast._cut_at_words(long[0])) == long[0]
    assert tokenizer.encode_raw(long, dtype) == tokenizer.encode_raw_by_library(long, dtype)


def test_a_piece_of_many_ids_fits(tokenizer_file, dtype):
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    texts = [f" {q}{z}" for q in ("qzqzqzqz", "zqxjkvbp", "q" * 16, "z" * 40) for z in ("", "1")]
    assert max(len(i) for i in tokenizer.encode_batch(texts)) > 8
    for _ in range(2):  # the second time from the table
        assert tokenizer.encode_raw(texts, dtype) == tokenizer.encode_raw_by_library(texts, dtype)


def test_lone_surrogates_are_refused(tokenizer_file, dtype):
    tokenizer = build_tokenizer("HFTokenizer", str(tokenizer_file))
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode_raw(["fine", "a\ud83d"], dtype)


def test_the_cut_is_where_every_pattern_of_gpt2_cuts():
    assert [m.start() for m in re.finditer(fast._WORD_END, "a b  c 1 d, e\n f")] == [1, 8]
