"""Files that are hashed while they are written, and work on a thread beside."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.background import Background
from megatron.checkpoint.writing import FileWriter
from megatron.errors import RunError


def test_size_and_hash_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    # The text lies in memory of torch's that is gone while the tensors after it are written.
    large = torch.randn(1_000_000)
    state = {"large": large, "small": torch.arange(3), "step": 4, "text": "x" * 1_000_000}
    with FileWriter() as writer:
        writer.write_state(state, tmp_path / "a.pt")
        writer.write_state({"n": 1}, tmp_path / "b.pt")
        writer.write_bytes(b"text", tmp_path / "c.json")
        writer.write_bytes(None, tmp_path / "none")
        written = writer.finish()
    assert sorted(synced) == [str(tmp_path / name) for name in ("a.pt", "b.pt", "c.json")]
    assert set(written) == set(tmp_path.iterdir())
    for path, found in written.items():
        content = path.read_bytes()
        assert found == (len(content), hashlib.sha256(content).hexdigest())
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(again["large"], large)
    assert again["step"] == 4


def test_a_write_that_comes_up_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda to, data: write(to, bytes(data[:70_001])))
    with FileWriter() as writer:
        writer.write_state(torch.arange(100_000), tmp_path / "a.pt")
        ((size, digest),) = writer.finish().values()
    content = (tmp_path / "a.pt").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True), torch.arange(100_000))


def test_a_refusal_is_kept_until_the_end(tmp_path: Path) -> None:
    """/dev/full is a disk without space."""
    before = len(os.listdir("/proc/self/fd"))
    with FileWriter(needed=4_000_000) as writer:
        writer.write_state(torch.zeros(1_000_000), Path("/dev/full"))
        writer.write_state(torch.zeros(3), tmp_path / "next")
        with pytest.raises(RunError) as caught:
            writer.finish()
    assert "cannot write /dev/full: No space left" in str(caught.value)
    assert "4,000,000 bytes (4.0 MB) needed" in str(caught.value)
    assert not (tmp_path / "next").exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_pickled_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    with FileWriter() as writer:
        writer.write_state({"f": lambda: None}, tmp_path / "a.pt")
        with pytest.raises(Exception, match="pickle"):
            writer.finish()


def test_work_beside_is_waited_for_and_its_error_told_once() -> None:
    beside, gate, done = Background("test"), threading.Event(), []

    def work() -> None:
        gate.wait(60)
        done.append(threading.current_thread().name)

    def fail() -> None:
        raise RunError("full")

    assert beside.wait()
    beside.start(work)
    assert not beside.wait(0.01)
    gate.set()
    beside.start(fail)  # which waits for the work before
    assert done == ["test"]
    with pytest.raises(RunError, match="full"):
        beside.wait()
    assert not beside.failed
    beside.start(fail)
    while not beside.failed:
        pass
    with pytest.raises(RunError, match="full"):
        beside.start(work)
    assert beside.wait()
