"""Every key of filling in the middle reaches the windows that a run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import local_tasks, runs

import megatron.mixing  # noqa: F401
from megatron.config import load_config
from megatron.data.writer import TokenWriter
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.train import train_byte_level_bpe
from megatron.training.check import preflight
from megatron.training.infilling import run_infilling

MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<pre>", "<suf>", "<mid>")
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tokenizer with the tokens of two models, and text that it wrote."""
    folder = tmp_path_factory.mktemp("infilling")
    vocabulary = folder / "tokenizer.json"
    texts = [local_tasks.text(seed, 40) for seed in range(60)]
    train_byte_level_bpe(
        texts, vocabulary, vocab_size=300, special_tokens=("<|endoftext|>", *MARKS)
    )
    tokenizer = build_tokenizer("HFTokenizer", str(vocabulary))
    with TokenWriter(folder / "text", np.uint16) as writer:
        for text in texts:
            writer.add(np.array([*tokenizer.encode(text), tokenizer.eod], dtype=np.uint16))
    return folder


def rows(folder: Path, **changes: Any) -> np.ndarray:
    """Return what a run of this configuration reads of its first windows."""
    content = runs.config(
        folder,
        folder / "run",
        domains={"text": {"train": str(folder / "text")}},
        mixing={"method": "static"},
        vocab_size=300,
        seq_length=LENGTH,
        tokenizer_type="HFTokenizer",
        vocab_file=str(folder / "tokenizer.json"),
        num_gpus=1,
        **changes,
    )
    file = runs.write_config(folder / "config.yml", content)
    checked = preflight(load_config([str(file)]), world_size=1, gpus=0)
    try:
        (domain,) = checked.domains.train
        return np.stack([domain.sample(0, sample) for sample in range(12)])
    finally:
        checked.domains.close()


def test_each_key_changes_what_is_read(folder: Path) -> None:
    tokenizer = build_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    prefix, suffix, middle, *others = (tokenizer.encode(mark)[0] for mark in MARKS)
    plain = rows(folder)
    assert not np.isin(plain, [prefix, suffix, middle]).any()
    always = rows(folder, fim_rate=1.0, fim_spm_rate=0.0)
    assert all((row == prefix).any() and (row == middle).any() for row in always)
    # In PSM order the suffix's token stands between the two, in SPM order behind the prefix's.
    spm = rows(folder, fim_rate=1.0, fim_spm_rate=1.0)
    behind = [read[:, 1:][read[:, :-1] == prefix] for read in (spm, always)]
    assert (behind[0] == suffix).all()
    assert not (behind[1] == suffix).all()
    some = rows(folder, fim_rate=0.3, fim_spm_rate=0.0)
    assert 0 < (some == prefix).sum() < (always == prefix).sum()
    renamed = rows(
        folder,
        fim_rate=1.0,
        fim_spm_rate=0.0,
        fim_prefix_token="<pre>",
        fim_suffix_token="<suf>",
        fim_middle_token=others[2],
    )
    expected = always.copy()
    for old, new in zip((prefix, suffix, middle), others, strict=True):
        expected[always == old] = new
    np.testing.assert_array_equal(renamed, expected)
    tokens = rows(folder, fim_rate=1.0, fim_spm_rate=0.0, fim_level="token")
    assert not np.array_equal(tokens, always)
    whole = rows(folder, fim_rate=1.0, fim_spm_rate=0.0, fim_level="token", fim_unit="window")
    assert ((whole == prefix).sum(axis=1) <= 1).all()  # none where the suffix is too short
    assert (whole == prefix).sum() > len(whole) / 2
    assert (tokens == prefix).sum() > len(tokens)


@pytest.mark.option("eod_token_id")
def test_which_token_ends_a_document(folder: Path) -> None:
    def end(**changes: Any) -> int | None:
        content = runs.config(folder, folder / "run", fim_rate=0.5, vocab_size=300, **changes)
        content["domains"] = {"text": {"train": str(folder / "text")}}
        content |= {"vocab_file": str(folder / "tokenizer.json"), "tokenizer_type": "HFTokenizer"}
        file = runs.write_config(folder / "end.yml", content)
        infilling = run_infilling(load_config([str(file)]))
        assert infilling is not None
        return infilling.eod

    assert end() == 0
    assert end(eod_token_id=9) == 9
