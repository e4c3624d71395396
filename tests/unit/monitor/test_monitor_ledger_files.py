"""The files survive anything that can happen to the process that writes them."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import RunError
from megatron.monitor import append
from megatron.monitor.append import AppendFile
from megatron.monitor.encode import VectorEncoder, dumps, named, number

ROOT = Path(__file__).resolve().parents[3]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path: Path, steps: list[int], resume_step: int | None = None) -> None:
    file = AppendFile(path)
    file.open(resume_step)
    for step in steps:
        file.write(dumps({"step": step, "x": "y" * (step % 7)}))
    file.close()


def test_resume_cuts_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    write_steps(path, list(range(1, 21)))
    write_steps(path, list(range(13, 31)), resume_step=12)
    assert [record["step"] for record in read(path)] == list(range(1, 31))


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_every_torn_end_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Whatever prefix of the file reached the disk, exactly its whole records up to s stay."""
    monkeypatch.setattr(append, "BLOCK", block)
    monkeypatch.setattr(append.os, "fsync", lambda descriptor: None)  # a thousand files: slow
    path = tmp_path / "mixture.jsonl"
    write_steps(path, [0, 1, 2, 2, 3, 5, 6])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        for resume_step in (0, 2, 4, 9):
            path.write_bytes(whole[:length])
            file = AppendFile(path)
            tail = file.open(resume_step)
            file.close()
            complete = whole[: whole.rfind(b"\n", 0, length) + 1].splitlines(keepends=True)
            kept = [line for line in complete if json.loads(line)["step"] <= resume_step]
            assert path.read_bytes() == b"".join(kept)
            steps = [json.loads(line)["step"] for line in kept]
            assert tail.last_step == (steps[-1] if steps else None)
            assert len(tail.at_last) == steps.count(steps[-1]) if steps else not tail.at_last


def test_zeros_left_by_a_power_cut_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    write_steps(path, [1, 2, 3])
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 5000 + b"\n" + b"\0" * 300)
    tail = AppendFile(path)
    assert tail.open(3).dropped == 2
    tail.close()
    assert path.read_bytes() == good


def test_new_run_sets_an_earlier_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    write_steps(path, [1, 2, 3])
    write_steps(path, [1])
    assert [record["step"] for record in read(path)] == [1]
    assert len(read(tmp_path / "mixture.jsonl.previous")) == 3


def test_the_cut_is_one_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before or after the cut leaves the old file or the new one."""
    path = tmp_path / "mixture.jsonl"
    write_steps(path, list(range(1, 50)))
    before = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(append.os, "ftruncate", die)
    with pytest.raises(KeyboardInterrupt):
        AppendFile(path).open(20)
    assert path.read_bytes() == before


WRITER = """
import sys
from pathlib import Path
from megatron.monitor.append import AppendFile
from megatron.monitor.encode import dumps
file = AppendFile(Path(sys.argv[1]), buffer_bytes=3000)
file.open(int(sys.argv[2]) if len(sys.argv) > 2 else None)
step = int(sys.argv[2]) if len(sys.argv) > 2 else 0
while True:
    step += 1
    file.write(dumps({"step": step, "pad": "z" * (step * 37 % 900)}))
    if step % 50 == 0:
        file.flush(sync=True)
        print(step, flush=True)
"""


def test_kill_at_random_moments_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    rng = np.random.default_rng(5)
    resume: list[str] = []
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), *resume],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        flushed = process.stdout.readline()
        time.sleep(float(rng.uniform(0.0, 0.03)))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        checkpoint = int(rest[-1] if rest else flushed)
        repaired = AppendFile(path)
        assert repaired.open(checkpoint).last_step == checkpoint
        repaired.close()
        assert [record["step"] for record in read(path)] == list(range(1, checkpoint + 1))
        resume = [str(checkpoint)]


def test_full_disk_names_path_and_bytes_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mixture.jsonl"
    file = AppendFile(path)
    file.open(None)
    file.write('{"step":1}')
    file.flush()
    real = os.write
    calls = []

    def half(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(descriptor, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(append.os, "write", half)
    file.write('{"step":2,"pad":"zzzz"}')
    with pytest.raises(RunError, match=r"mixture\.jsonl: no space left for 24 bytes"):
        file.flush()
    monkeypatch.undo()
    assert read(path) == [{"step": 1}]
    file.flush()  # once there is room again
    assert [record["step"] for record in read(path)] == [1, 2]


def test_lines_reach_the_system_after_a_while(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "metrics.jsonl"
    file = AppendFile(path, clock=lambda: now[0])
    file.open(None)
    file.write('{"step":1}')
    assert path.read_bytes() == b""
    now[0] = 2.5
    file.write('{"step":2}')
    assert len(read(path)) == 2
    file.close()
    with pytest.raises(ValueError, match="not open"):
        file.write("{}")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be opened"):
        AppendFile(tmp_path / "missing" / "mixture.jsonl").open(None)


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    )
)
def test_floats_read_back_to_the_same_bits(rows: list[list[float]]) -> None:
    names = ["a", 'q"uo\\te', "ünï", "d\n"]
    encoder = VectorEncoder(names)
    for row in rows:
        text = encoder.encode(np.array(row))
        assert "\n" not in text
        back = json.loads(text, parse_constant=pytest.fail)
        assert list(back) == names
        for value, found in zip(row, back.values(), strict=True):
            if np.isfinite(value):
                assert bits(found) == bits(value)
            else:
                assert found is None


def test_signed_zero_and_a_change_of_type_are_seen() -> None:
    encoder = VectorEncoder(["a", "b"])
    assert encoder.encode(np.array([0.0, 1.0])) == '{"a":0.0,"b":1.0}'
    assert encoder.encode(np.array([-0.0, 1.0])) == '{"a":-0.0,"b":1.0}'
    assert encoder.encode(np.array([3, 4])) == '{"a":3,"b":4}'
    assert encoder.encode(np.array([3, 5])) == '{"a":3,"b":5}'
    assert encoder.encode(np.array([np.nan, 5.0])) == '{"a":null,"b":5.0}'


def test_strided_vectors_are_read_in_order() -> None:
    matrix = np.arange(6.0).reshape(3, 2)
    assert VectorEncoder(["a", "b", "c"]).encode(matrix[:, 1]) == '{"a":1.0,"b":3.0,"c":5.0}'


def test_non_finite_numbers_are_null() -> None:
    assert number(float("inf")) is None
    assert named({"a": float("nan"), "b": 1}) == {"a": None, "b": 1.0}
    with pytest.raises(ValueError, match="JSON"):
        dumps({"x": float("nan")})
