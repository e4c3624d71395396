"""Selection killed at random moments: given again, its commands leave the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import runs
from support.selection import write_lines

PROGRAM = str(runs.ROOT / "tools" / "select_data.py")
WORDS = [f"w{n}" for n in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, a target, and what uninterrupted commands make of them."""
    root = tmp_path_factory.mktemp("selection")
    drawn = random.Random(0)
    records = [{"text": " ".join(drawn.choices(WORDS, k=30))} for _ in range(4000)]
    write_lines(root / "a.jsonl.gz", records[:2500])
    write_lines(root / "b.jsonl", records[2500:])
    write_lines(root / "exam.jsonl", [{"text": " ".join(WORDS[:9])}])
    for words in (score(root, "whole"), select(root, "whole", "whole")):
        done = subprocess.run(words, env=runs.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return root


def score(root: Path, name: str, *more: str) -> list[str]:
    train = [str(root / "a.jsonl.gz"), str(root / "b.jsonl")]
    words = ["--train", *train, "--target", str(root / "exam.jsonl"), "--chunk-documents", "16"]
    out = ["--out", str(root / f"{name}.parquet"), "--tokenizer-type", "CharLevelTokenizer"]
    return [sys.executable, PROGRAM, "score", "--method", "bm25", *words, *out, *more]


def select(root: Path, name: str, out: str) -> list[str]:
    words = ["--share", "0.6", "--order", "mid", "--name", "x", "--out", str(root / out)]
    table = ["--scores", str(root / f"{name}.parquet"), "--tokenizer-type", "CharLevelTokenizer"]
    return [sys.executable, PROGRAM, "select", *table, *words]


def kill_after(
    seconds: float, *commands: list[str], ready: Callable[[], bool] | None = None
) -> None:
    """Start commands together, and kill them after a time, or as soon as they are ``ready``."""
    started = [
        subprocess.Popen(
            words, env=runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for words in commands
    ]
    deadline = time.monotonic() + (seconds if ready is None else 120)
    while time.monotonic() < deadline and not (ready is not None and ready()):
        time.sleep(0.002)
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error.decode()


def finish(*commands: list[str]) -> float:
    """Run commands one after the other; return how long the last took."""
    for words in commands:
        begun = time.monotonic()
        done = subprocess.run(words, env=runs.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - begun


def chunks(root: Path, name: str) -> int:
    return len(list((root / f"{name}.parquet.work" / "chunks").glob("[0-9]*.parquet")))


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_scoring_is_the_same_whenever_it_was_killed(corpus: Path, rounds: int) -> None:
    name = f"killed{rounds}"
    drawn = random.Random(rounds)
    shards = [score(corpus, name, "--shard", f"{number}/3") for number in range(3)]
    # Alone, which both together are slower than.
    length = finish(shards[0])
    progress = [chunks(corpus, name)]
    # Surely in the middle, then anywhere.
    kill_after(0, *shards[1:], ready=lambda: chunks(corpus, name) > progress[0] + 2)
    progress.append(chunks(corpus, name))
    assert progress[0] < progress[1] < 250
    for _ in range(rounds - 1):
        kill_after(drawn.uniform(0.5, 1.2) * length, *shards[1:])
        progress.append(chunks(corpus, name))
    assert progress == sorted(progress)  # nothing that was there is lost
    merge = [sys.executable, PROGRAM, "merge", "--out", str(corpus / f"{name}.parquet")]
    finish(*shards[1:])
    if rounds > 3:
        kill_after(drawn.uniform(0.2, 1.2), merge)
    finish(merge)
    assert (corpus / f"{name}.parquet").read_bytes() == (corpus / "whole.parquet").read_bytes()


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_choice_is_the_same_whenever_it_was_killed(corpus: Path, rounds: int) -> None:
    drawn = random.Random(rounds)
    length = finish(select(corpus, "whole", f"timed{rounds}"))
    for number in range(rounds):
        out = f"out{rounds}" if number % 2 else f"out{rounds}-{number}"
        kill_after(drawn.uniform(0.3, 1.0) * length, select(corpus, "whole", out))
        if number % 2 == 0:
            finish(select(corpus, "whole", out))
            same(corpus / "whole", corpus / out)
    finish(select(corpus, "whole", f"out{rounds}"))
    same(corpus / "whole", corpus / f"out{rounds}")


def same(one: Path, other: Path) -> None:
    for path in one.glob("x*"):
        if path.suffix in (".jsonl", ".bin", ".idx", ".meta.json"):
            assert (other / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((other / "x.selection.json").read_text())["state"] == "done"
    left = [path.name for path in other.iterdir() if path.name.endswith((".tmp", ".spool"))]
    assert not left
