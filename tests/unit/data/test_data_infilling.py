"""Fill in the middle: what is moved where, how often, and that nothing is left to chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.domain import open_domain
from megatron.data.infilling import Codec, Infilling
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.data.writer import TokenWriter

PRE, SUF, MID, EOD = 900, 901, 902, 0
FIM = Infilling(rate=1.0, spm_rate=0.0, prefix=PRE, suffix=SUF, middle=MID, eod=EOD, seed=5)


def apply(fim: Infilling, tokens: Any, starts: Any = (), sample: int = 0) -> np.ndarray:
    found, _ = fim.apply(
        np.asarray(tokens), np.asarray(starts, dtype=np.int64), domain="a", epoch=0, sample=sample
    )
    return found


def restored(piece: np.ndarray) -> list[int]:
    """Return the document that a rearranged piece was made of, without what was cut off."""
    ids = piece.tolist()
    if ids[:1] != [PRE]:
        return ids
    middle = ids.index(MID)
    if ids[1] == SUF:  # SPM: suffix, then prefix and middle as one
        return ids[middle + 1 :] + ids[2:middle]
    suffix = ids.index(SUF)
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle]


@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_a_document_is_rearranged_and_can_be_put_together_again(spm: float) -> None:
    fim = replace(FIM, spm_rate=spm, eod=None)
    tokens, moved, cuts = np.arange(1, 41), 0, set()
    for sample in range(200):
        found = apply(fim, tokens, sample=sample)
        assert len(found) == 40
        if found[0] == PRE:
            moved += 1
            # Three tokens of the suffix's end make room for the three marks.
            assert restored(found) == tokens[:37].tolist()
            assert (found[1] == SUF) or spm == 0.0
            cuts.add(tuple(np.flatnonzero(found >= PRE).tolist()))
    assert moved > 150, "only a suffix of fewer than three tokens is left alone"
    assert len(cuts) > 30


def test_rates_are_kept() -> None:
    fim = replace(FIM, rate=0.5, spm_rate=0.25)
    found = [apply(fim, np.arange(1, 201), sample=sample) for sample in range(2000)]
    moved = [piece for piece in found if piece[0] == PRE]
    spm = [piece for piece in moved if piece[1] == SUF]
    assert len(moved) == pytest.approx(0.5 * 2000 * 0.97, abs=80)
    assert len(spm) == pytest.approx(0.25 * len(moved), abs=60)
    none = replace(FIM, rate=0.0)
    assert (apply(none, np.arange(1, 201)) == np.arange(1, 201)).all()


def test_documents_are_cut_apart_and_keep_their_place_and_their_end() -> None:
    lengths = [30, 1, 25, 44]
    tokens = np.concatenate([np.append(np.arange(1, n), EOD) for n in lengths])
    starts = np.cumsum([0, *lengths[:-1]])
    moved = 0
    for sample in range(50):
        found = apply(FIM, tokens, starts, sample)
        for first, length in zip(starts, lengths, strict=True):
            piece = found[first : first + length]
            assert piece[-1] == EOD
            assert (piece[:-1] != EOD).all()
            moved += piece[0] == PRE
            kept = restored(piece[:-1])
            assert kept == list(range(1, len(kept) + 1))
        as_one = apply(replace(FIM, unit="window"), tokens, starts, sample)
        assert (as_one == PRE).sum() <= 1
    assert moved > 100


def test_it_is_a_function_of_seed_domain_epoch_and_sample_alone() -> None:
    tokens = np.arange(1, 101)
    one, other = apply(FIM, tokens, sample=3), apply(FIM, tokens, sample=3)
    assert (one == other).all()
    assert (apply(FIM, tokens, sample=4) != one).any()
    assert (apply(replace(FIM, seed=6), tokens, sample=3) != one).any()
    for domain, epoch in (("b", 0), ("a", 1)):
        found, _ = FIM.apply(
            tokens, np.zeros(0, dtype=np.int64), domain=domain, epoch=epoch, sample=3
        )
        assert (found != one).any()


def words(ids: Any) -> str:
    return "".join(chr(96 + i) * 2 for i in ids)


def encode(text: str) -> list[int]:
    """Two letters alike are one token; a letter alone is a token of its own."""
    ids, place = [], 0
    while place < len(text):
        pair = text[place : place + 2]
        double = len(pair) == 2 and pair[0] == pair[1]
        ids.append(ord(pair[0]) - 96 + (0 if double else 100))
        place += 2 if double else 1
    return ids


def decode(ids: Any) -> str:
    return "".join(chr(96 + i) * 2 if i < 100 else chr(96 + i - 100) for i in ids)


def test_cuts_fall_between_characters_and_the_text_stays() -> None:
    codec = Codec(encode=encode, decode=decode)
    fim = replace(FIM, level="character", codec=codec, eod=None)
    tokens = np.arange(1, 27)
    within = 0
    for sample in range(100):
        found, padding = fim.apply(
            tokens, np.zeros(0, dtype=np.int64), domain="a", epoch=0, sample=sample
        )
        assert not padding.any()
        if found[0] == PRE:
            within += bool(((found > 100) & (found < PRE)).any())
            text = decode(restored(found))
            assert len(text) >= 40
            assert decode(tokens).startswith(text)
    assert within > 30, "cuts fall within tokens"
    unsound = replace(fim, codec=Codec(encode=encode, decode=lambda ids: decode(ids) + "\ufffd"))
    found = apply(unsound, tokens)
    assert restored(found) == tokens[:23].tolist(), "cut between tokens where text is not sound"


def test_training_rows_are_rearranged_and_padding_is_not_counted(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "t", "uint16") as writer:
        for number in range(60):
            writer.add(np.append(np.arange(1, 20 + number % 9), EOD))

    def halved(text: str) -> list[int]:  # finds fewer tokens than there were
        return [200] * (len(text) // 2) + [1] * (len(text) % 2)

    short = Codec(encode=halved, decode=lambda ids: "".join("a" * (1 + (i == 200)) for i in ids))
    for fim, pads in ((FIM, False), (replace(FIM, level="character", codec=short), True)):
        domain = open_domain("a", [tmp_path / "t"], seq_length=64, seed=1, infilling=fim)
        plain = open_domain("a", [tmp_path / "t"], seq_length=64, seed=1)
        assert domain.fingerprint() != plain.fingerprint()
        assert domain.masks == pads
        sampler = Sampler(["a"], [domain], seed=3, global_batch=8)
        loader = Loader(
            [domain], seq_length=64, micro_batch=8, accumulation=1, data_rank=0, data_size=1
        )
        plan = sampler.plan(1, [1.0])
        batch = next(loader.load(plan))
        loader.close()
        assert (batch.tokens == PRE).sum() > 8
        assert (domain.sample(0, int(plan.sample[0]))[:-1] == batch.tokens[0]).all()
        starts = domain.document_starts(0, int(plan.sample[0]))
        assert (batch.tokens[0][starts[1:-1] - 1] == EOD).all(), "documents stay where they are"
        assert (batch.loss_mask == 0).any() == pads
        mean = (batch.loss_mask.sum(axis=1) * batch.sample_weight).sum()
        assert mean == pytest.approx(1)
