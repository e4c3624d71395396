"""Interruptions: real kills, crashes at every step of the end, changed minds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ingest_files import sha, write_jsonl

from megatron.data.ingest import journal as journal_module
from megatron.data.ingest import pipeline
from megatron.data.ingest.settings import PreprocessSettings
from megatron.data.reader import TokenReader
from megatron.errors import DataError

PROGRAM = Path(__file__).parent / "programs" / "slow_preprocess.py"


@pytest.fixture
def long_corpus(tmp_path, docs) -> Path:
    return write_jsonl(tmp_path / "long.jsonl", [{"text": doc} for doc in docs * 4])


def command(corpus, prefix, tokenizer_file, workers, pause) -> list[str]:
    given = [PROGRAM, 4000, pause, "--input", corpus, "--output-prefix", prefix, "--append-eod",
             "--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer_file,
             "--save-seconds", 0, "--workers", workers]  # fmt: skip
    return [sys.executable, *map(str, given)]


def looks_complete(prefix) -> bool:
    """A dataset is what opens; without an index nothing does."""
    if not Path(f"{prefix}_text_document.idx").exists():
        with pytest.raises(DataError):
            TokenReader(f"{prefix}_text_document")
        return False
    with TokenReader(f"{prefix}_text_document"):
        return True


def changed_at(path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def killed_run(given, environment, journal, rng, sign) -> int:
    """Start, wait until something new is durable, kill at a random moment; return the code."""
    before = changed_at(journal)
    process = subprocess.Popen(
        given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None and changed_at(journal) == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(sign)
        return process.wait(timeout=60)
    finally:
        process.kill()


def workers_of(prefix) -> list[int]:
    """Return processes whose command line or environment names this run's prefix."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
                status = (entry / "stat").read_text()
            except OSError:
                continue
            if str(prefix).encode() in environ and ") Z" not in status:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("workers", "sign"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGTERM)]
)
def test_killed_again_and_again_ends_with_the_same_bytes(
    workers, sign, long_corpus, tmp_path, tokenizer_file, environment, preprocess
):
    preprocess("--input", long_corpus, "--append-eod", "--output-prefix", tmp_path / "whole")
    prefix = tmp_path / "cut"
    marked = {**environment, "NEOMIX_TEST_RUN": str(prefix)}
    rng = random.Random(workers)
    journal = tmp_path / "cut.preprocess.json"
    kills = 0
    for _ in range(3):
        given = command(long_corpus, prefix, tokenizer_file, workers, 0.03)
        code = killed_run(given, marked, journal, rng, sign)
        kills += code in (-signal.SIGKILL, 143)
        if code == 0:
            break
        assert not looks_complete(prefix)
    assert kills
    deadline = time.monotonic() + 20
    while workers_of(prefix) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers_of(prefix)  # no worker outlives its parent
    out = preprocess("--input", long_corpus, "--append-eod", "--output-prefix", prefix)
    assert sha(f"{prefix}_text_document") == sha(tmp_path / "whole_text_document")
    again = preprocess("--input", long_corpus, "--append-eod", "--output-prefix", prefix)
    assert "already complete" in again
    assert "already complete" not in out


class Crashes:
    """Ends a forked child at the n-th call of any of some functions."""

    def __init__(self, monkeypatch, n):
        self.left = n
        for module, name in (
            (os, "replace"), (os, "fsync"), (pipeline, "write_sidecar"),
            (pipeline, "write_journal"), (journal_module.os, "replace"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call):
        def counted(*arguments, **keywords):
            self.left -= 1
            if self.left < 0:
                os._exit(77)
            return call(*arguments, **keywords)

        return counted


def test_a_crash_at_every_step_of_the_end_is_mended(corpus, tmp_path, tokenizer_file, monkeypatch):
    """Forks a run for each call that makes something durable or gives it a name."""

    def settings(prefix):
        return PreprocessSettings(
            inputs=(str(corpus),), output_prefix=str(prefix), tokenizer_type="HFTokenizer",
            vocab_file=tokenizer_file, append_eod=True, keys=("text",), fast=False,
        )  # fmt: skip

    pipeline.preprocess(settings(tmp_path / "whole"))
    expected = sha(tmp_path / "whole_text_document")
    crashed = 0
    for n in range(40):
        prefix = tmp_path / f"n{n}"
        child = os.fork()
        if child == 0:
            try:
                Crashes(monkeypatch, n)
                pipeline.preprocess(settings(prefix))
                os._exit(0)
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 77), code
        if code == 0:
            break
        crashed += 1
        looks_complete(prefix)
        pipeline.preprocess(settings(prefix))
        assert sha(f"{prefix}_text_document") == expected
        assert Path(f"{prefix}_text_document.meta.json").exists()
        assert not list(tmp_path.glob(f"n{n}*.tmp"))
    else:
        pytest.fail("the run never came to its end")
    assert crashed >= 8


def test_a_finished_run_is_left_alone_and_overwritten_when_asked(preprocess, corpus, tmp_path):
    given = ("--input", corpus, "--output-prefix", tmp_path / "a")
    preprocess(*given)
    before = Path(tmp_path / "a_text_document.bin").stat()
    assert "already complete" in preprocess(*given)
    after = Path(tmp_path / "a_text_document.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "already complete" not in preprocess(*given, "--overwrite")
    assert Path(tmp_path / "a_text_document.bin").stat().st_ino != before.st_ino


def test_other_settings_are_refused_by_name(preprocess, corpus, tmp_path, docs):
    given = ("--input", corpus, "--output-prefix", tmp_path / "a")
    preprocess(*given)
    assert "append_eod was false, is true" in preprocess(*given, "--append-eod", code=2)
    write_jsonl(corpus, [{"text": "other"}])
    out = preprocess(*given, code=2)
    assert "corpus.jsonl has changed" in out
    assert "--overwrite" in out
    assert "1 documents" in preprocess(*given, "--overwrite")


def test_files_of_unknown_origin_are_not_replaced(preprocess, corpus, tmp_path):
    given = ("--input", corpus, "--output-prefix", tmp_path / "a")
    preprocess(*given)
    (tmp_path / "a.preprocess.json").unlink()
    assert "nothing says how it was made" in preprocess(*given, code=2)
    preprocess(*given, "--overwrite")


def test_a_damaged_result_is_not_called_complete(preprocess, corpus, tmp_path):
    given = ("--input", corpus, "--output-prefix", tmp_path / "a")
    preprocess(*given)
    with open(tmp_path / "a_text_document.bin", "r+b") as file:
        file.truncate(100)
    assert "truncated" in preprocess(*given, code=2)
    preprocess(*given, "--overwrite")


def test_a_damaged_journal_is_told(preprocess, corpus, tmp_path):
    (tmp_path / "a.preprocess.json").write_text("{")
    given = ("--input", corpus, "--output-prefix", tmp_path / "a")
    assert "a.preprocess.json: unreadable" in preprocess(*given, code=2)
    preprocess(*given, "--overwrite")


def test_a_second_run_of_a_prefix_is_refused(preprocess, corpus, tmp_path):
    with journal_module.output_lock(str(tmp_path / "a")):
        out = preprocess("--input", corpus, "--output-prefix", tmp_path / "a", code=2)
    assert f"process {os.getpid()}" in out
    preprocess("--input", corpus, "--output-prefix", tmp_path / "a")


def test_bad_lines_met_late_may_be_skipped_without_starting_again(
    preprocess, tmp_path, docs, monkeypatch
):
    from megatron.data.ingest import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    good = [json.dumps({"text": doc}) for doc in docs]
    (tmp_path / "x.jsonl").write_text("\n".join([*good, "{oops}", *good]))
    (tmp_path / "y.jsonl").write_text("\n".join([*good, *good]))
    given = ("--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "a")
    preprocess(*given, code=2)
    out = preprocess(*given, "--bad-records", "skip")
    assert "continuing an interrupted run after" in out
    preprocess("--input", tmp_path / "y.jsonl", "--output-prefix", tmp_path / "b")
    assert sha(tmp_path / "a_text_document") == sha(tmp_path / "b_text_document")


def test_a_dying_worker_is_told(long_corpus, tmp_path, tokenizer_file, environment):
    given = command(long_corpus, tmp_path / "a", tokenizer_file, 2, 0.05)
    process = subprocess.Popen(
        given, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[int] = []
    while len(workers) < 2:
        time.sleep(0.01)
        for child in map(int, children.read_text().split()):
            if child not in workers:
                # Held until one of them is dead, so that they cannot be done before.
                os.kill(child, signal.SIGSTOP)
                workers.append(child)
    os.kill(workers[0], signal.SIGKILL)
    os.kill(workers[1], signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "a worker process died (signal 9)" in err
    assert "Traceback" not in err
