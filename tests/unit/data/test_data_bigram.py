"""The bigram baseline: its numbers by hand, and its command line."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import bigram_model
from megatron.data.bigram import Bigram, evaluate
from megatron.data.writer import TokenWriter
from megatron.errors import DataError, run_command


def test_losses_are_those_of_counts_by_hand(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows, others = random.integers(0, 7, (40, 12)), random.integers(0, 7, (9, 12))
    model = Bigram(7)
    model.update(rows[:25])
    model.update(rows[25:])
    counts = np.ones((7, 7))
    for row in rows:
        for token, following in itertools.pairwise(row):
            counts[token, following] += 1
    chance = counts / counts.sum(axis=1, keepdims=True)
    expected = [
        np.mean([-math.log(chance[a, b]) for a, b in itertools.pairwise(row)]) for row in others
    ]
    assert model.losses(others) == pytest.approx(expected)
    loss, perplexity, count = evaluate(model, [others[:4], others[4:]])
    assert (loss, perplexity, count) == (
        pytest.approx(np.mean(expected)), pytest.approx(np.mean(np.exp(expected))), 9,
    )  # fmt: skip
    model.save(tmp_path / "m.npy")
    assert (Bigram.load(tmp_path / "m.npy").losses(others) == model.losses(others)).all()
    assert Bigram(7).losses(others) == pytest.approx(math.log(7))
    with pytest.raises(DataError, match="outside the vocabulary of 7"):
        model.losses(others + 1)


def test_the_command_counts_measures_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TokenWriter(tmp_path / "cycle", "uint16") as writer:
        for start in range(60):
            writer.add((np.arange(50) + start) % 10)

    def run(*flags: object) -> tuple[int, str]:
        given = ["--dataset_name", "cycle", "--train_samples", "60", "--seq_length", "16",
                 "--save_path", str(tmp_path / "models"), "--split", "80,10,10",
                 "--dataset_path", str(tmp_path / "{name}"), *map(str, flags)]  # fmt: skip
        code = run_command(lambda: bigram_model.main(given))
        output = capsys.readouterr()
        return code, output.out + output.err

    assert run() == (2, "error: nothing to do: give --train, --evaluate or both\n")
    assert "count it first" in run("--evaluate")[1]
    assert "give --vocab_size" in run("--train")[1]
    code, said = run("--train", "--evaluate", "--vocab_size", 10, "--evaluate_samples", 5)
    assert code == 0, said
    losses = [float(line.split()[2].rstrip(",")) for line in said.splitlines()[1:]]
    assert len(losses) == 3
    assert max(losses) < 1.0, "a cycle is known but for the documents' ends"
    assert "(5 windows)" in said
    assert "is there already" in run("--train", "--vocab_size", 10)[1]
    assert run("--train", "--train_samples", 0)[0] == 2
