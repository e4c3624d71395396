"""A crash at every disk operation of a save; a rank that dies in it; a disk that is full."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron.checkpoint import CheckpointStore
from megatron.checkpoint.background import Background
from megatron.checkpoint.writing import FileWriter
from megatron.errors import RunError


def load(name: str) -> ModuleType:
    """Import a helper that lies beside the tests (which are no package)."""
    path = Path(__file__).resolve().parent / "programs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"checkpoint_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults = load("faults")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's slowness is no part of these tests; loss of what was not synced is simulated."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(path: Path, content: bytes) -> None:
    """Write as torch.save does: piece by piece, straight to its place, unsynced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(descriptor, content[:100])
    os.write(descriptor, content[100:])
    os.close(descriptor)


def contents(step: int, version: str = "") -> dict[str, bytes]:
    text = f"step {step} {version}\n".encode()
    return {"model.pt": text * 20, "zero/optimizer.pt": text * 11, "state.json": text}


def save(store: CheckpointStore, step: int, version: str = "", kind: str = "") -> None:
    temporary = store.begin(step, kind=kind)
    os.mkdir(temporary / "zero")
    for name, content in contents(step, version).items():
        write(temporary / name, content)
    entries = store.seal_files(temporary / name for name in contents(step))
    store.commit(step, entries, layout={"data": 2}, kind=kind)


def save_behind(store: CheckpointStore, step: int) -> None:
    """Save as a run does that goes on meanwhile: a thread writes, hashes, syncs and commits."""
    temporary = store.begin(step)
    os.mkdir(temporary / "zero")
    state = {"weights": torch.zeros(10), "step": step}

    def work() -> None:
        with FileWriter() as writer:
            writer.write_state(state, temporary / "layer.pt")
            for name, content in contents(step).items():
                writer.write_bytes(content, temporary / name)
            sealed = writer.finish()
        store.commit(step, store.entries(sealed), layout={"data": 2})

    beside = Background("checkpoint")
    beside.start(work)
    beside.wait()


def holds(path: Path, step: int, version: str = "") -> bool:
    return all((path / name).read_bytes() == data for name, data in contents(step, version).items())


def newest(folder: Path) -> tuple[int, str]:
    """Return (step, version) of what a resume would load, having compared its content."""
    found = CheckpointStore(folder).newest_valid()
    if found is None:
        return 0, ""
    path, manifest = found
    for version in ("", "again"):
        if holds(path, manifest.step, version):
            return manifest.step, version
    raise AssertionError(f"{path} verifies but holds something else")


# name: (steps saved before, the save that crashes, what there is before it, after it)
Case = tuple[list[int], Callable[[CheckpointStore], None], tuple[int, str], tuple[int, str]]
CASES: dict[str, Case] = {
    "first": ([], lambda store: save(store, 10), (0, ""), (10, "")),
    "with pruning": ([10, 20], lambda store: save(store, 30), (20, ""), (30, "")),
    "same step again": ([10, 20], lambda store: save(store, 20, "again"), (20, ""), (20, "again")),
    "over a leftover": ([10, -20], lambda store: save(store, 20), (10, ""), (20, "")),
    "written behind": ([10, 20], lambda store: save_behind(store, 30), (20, ""), (30, "")),
    "companion": ([10], lambda store: save(store, 10, kind="universal"), (10, ""), (10, "")),
}


def prepare(folder: Path, steps: list[int]) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last=2)
    for step in steps:
        if step > 0:
            save(store, step)
        else:
            write(store.begin(-step) / "model.pt", b"half")
    return store


def operations_of(folder: Path, action: Callable[[CheckpointStore], None]) -> list[str]:
    """Return the disk operations that ``action`` takes, by doing it in a child."""
    reading, writing = os.pipe()

    def counted() -> None:
        counter = faults.Faults(0, "before").install()
        action(CheckpointStore(folder, keep_last=2))
        os.write(writing, " ".join(counter.names).encode())

    assert faults.in_child(counted) == 0
    return os.read(reading, 10000).decode().split()


# What is written behind the steps has more operations; loss of power is the hardest of the modes.
MODES = [
    pytest.param(
        name,
        mode,
        marks=[pytest.mark.slow] if name == "written behind" and mode != "power" else [],
    )
    for name in CASES
    for mode in ("before", "half", "power")
]


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_crash_at_every_operation_of_a_save(
    tmp_path: Path, name: str, mode: str, record_property: Callable[[str, object], None]
) -> None:
    steps, action, before, after = CASES[name]
    template = tmp_path / "template"
    prepare(template, steps)
    if steps:
        shutil.copytree(template, tmp_path / "count")
    operations = operations_of(tmp_path / "count", action)
    assert len(operations) > 25
    outcomes = []
    for at, operation in enumerate(operations, start=1):
        if mode == "half" and operation != "write":
            continue
        folder = tmp_path / f"run{at}"
        if steps:
            shutil.copytree(template, folder)
        store = CheckpointStore(folder, keep_last=2)
        code = faults.in_child(lambda: action(store), faults.Faults(at, mode))  # noqa: B023
        assert code == 9, f"operation {at} of {len(operations)} did not take place"
        outcomes.append(newest(folder))
        _latest_names_a_complete_one(folder, absent=name == "same step again")
        # What the next start does: tidy up, load, go on, save.
        store.sweep()
        assert newest(folder) == outcomes[-1], f"sweeping after operation {at} changed the choice"
        left = os.listdir(folder) if folder.exists() else []
        assert not [name for name in left if re.search(r"\.(tmp|replaced|trash)$", name)]
        action(store)
        assert newest(folder) == after
    record_property("trials", len(outcomes))
    changes = [o for i, o in enumerate(outcomes) if i == 0 or outcomes[i - 1] != o]
    assert changes in ([before], [before, after]), changes
    if before != after:
        assert outcomes[0] == before
        assert outcomes[-1] == after, "the crash points do not reach over the commit"


def _latest_names_a_complete_one(folder: Path, *, absent: bool) -> None:
    latest = folder / "latest"
    if latest.exists():
        named = folder / latest.read_text().strip()
        # While a step is replaced by itself, its name is free for a moment.
        if named.exists() or not absent:
            assert CheckpointStore(folder).verify(named) == []


def test_a_crash_at_every_operation_of_a_sweep(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def mess(folder: Path) -> CheckpointStore:
        store = prepare(folder, [10, 20, 30])
        write(store.begin(40) / "model.pt", b"half")
        os.rename(folder / "global_step30", folder / "global_step30.replaced")
        shutil.copytree(folder / "global_step20", folder / "global_step20.replaced")
        shutil.copytree(folder / "global_step20", folder / "global_step10.trash")
        (folder / "latest.tmp").write_text("global")
        (folder / "latest").write_text("global_step10\n")
        return store

    def sweep(store: CheckpointStore) -> None:
        store.sweep()

    mess(tmp_path / "count")
    for at, _ in enumerate(operations_of(tmp_path / "count", sweep), start=1):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        store = mess(tmp_path / "run")
        assert newest(tmp_path / "run") == (30, "")
        assert faults.in_child(store.sweep, faults.Faults(at, "before")) == 9
        assert newest(tmp_path / "run") == (30, "")
        store.sweep()
        assert sorted(os.listdir(tmp_path / "run")) == ["global_step20", "global_step30", "latest"]
        assert (tmp_path / "run/latest").read_text() == "global_step30\n"
    record_property("trials", at)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks_dies_inside_a_save(
    tmp_path: Path, victim: int, record_property: Callable[[str, object], None]
) -> None:
    """Each rank writes its own files; rank 0 commits once rank 1's entries have arrived."""

    def rank_1(store: CheckpointStore, writing: int) -> None:
        path = store.temporary_path(20) / "rank_1.pt"
        write(path, b"1" * 300)
        entries = store.seal_files([path])
        os.write(writing, repr(entries).encode())

    def rank_0(store: CheckpointStore, reading: int) -> None:
        path = store.temporary_path(20) / "rank_0.pt"
        write(path, b"0" * 300)
        entries = store.seal_files([path])
        received = os.read(reading, 10000)
        if not received:
            os._exit(3)  # the peer is gone
        store.commit(20, {**entries, **eval(received)})

    for at in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        store = prepare(tmp_path / "run", [10])
        store.begin(20)
        reading, writing = os.pipe()
        fault = faults.Faults(at, "before")
        peer = os.fork()
        if peer == 0:
            if victim == 1:
                fault.install()
            rank_1(store, writing)
            os._exit(0)
        os.close(writing)
        code = faults.in_child(lambda: rank_0(store, reading), fault if victim == 0 else None)  # noqa: B023
        peer_code = os.waitstatus_to_exitcode(os.waitpid(peer, 0)[1])
        os.close(reading)
        found = CheckpointStore(tmp_path / "run").newest_valid()
        assert found is not None
        named = (tmp_path / "run/latest").read_text().strip()
        assert store.verify(tmp_path / "run" / named) == []
        if victim == 1 and peer_code != 0:
            assert (code, found[1].step, named) == (3, 10, "global_step10")
        if code == peer_code == 0:
            assert (found[1].step, named) == (20, "global_step20")
            assert at > 5
            record_property("trials", at)
            return
    raise AssertionError("the save never finished")


@pytest.mark.parametrize(
    ("code", "save_it"),
    [
        (errno.ENOSPC, save),
        (errno.EROFS, save),
        pytest.param(errno.ENOSPC, save_behind, marks=pytest.mark.slow),
    ],
)
def test_a_refusal_of_the_disk_at_every_operation(
    tmp_path: Path, code: int, save_it: Callable[[CheckpointStore, int], None]
) -> None:
    """The save ends with one error that names the path, and nothing else is harmed."""
    prepare(tmp_path / "count", [10, 20])
    shutil.copytree(tmp_path / "count", tmp_path / "template")
    operations = operations_of(tmp_path / "count", lambda store: save_it(store, 30))
    heard = 0
    for at in range(1, len(operations) + 1):
        folder = tmp_path / f"run{at}"
        shutil.copytree(tmp_path / "template", folder)
        store = CheckpointStore(folder, keep_last=2)
        reading, writing = os.pipe()

        def attempt(store: CheckpointStore = store, writing: int = writing) -> None:
            from megatron.checkpoint.files import disk_errors

            try:
                with disk_errors(store.temporary_path(30)):
                    save_it(store, 30)
            except RunError as error:
                os.write(writing, str(error).encode())

        assert faults.in_child(attempt, faults.Faults(at, "error", code)) == 0
        os.close(writing)
        message = os.read(reading, 10000).decode()
        os.close(reading)
        if message:
            heard += 1
            assert f"cannot write {folder}" in message
            assert os.strerror(code) in message
            if code == errno.ENOSPC:
                assert "bytes free" in message or "B) free" in message
        else:
            assert newest(folder) == (30, "")  # the failure was not in the way
        assert newest(folder)[0] in (20, 30)
        store.abort(30)
        assert not store.temporary_path(30).exists()
        store.sweep()
        save(store, 40)
        assert newest(folder) == (40, "")
    assert heard > len(operations) * 0.8


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.checkpoint import files

    store = prepare(tmp_path, [10])
    monkeypatch.setattr(files, "free_bytes", lambda path: 200)
    with pytest.raises(RunError) as caught:
        store.begin(20)  # by the size of the last one
    assert re.search(
        r"not enough disk space for .*global_step20\.tmp: [\d,]+ bytes needed, 200 bytes free",
        str(caught.value),
    )
    assert "keep_last_n_checkpoints" in str(caught.value)
    assert newest(tmp_path) == (10, "")
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    store.begin(20, bytes_needed=10**9)  # an estimate does not overrule experience
    for fresh in (CheckpointStore(tmp_path / "new").begin, partial(store.begin, kind="universal")):
        with pytest.raises(RunError, match=r"12,345,678 bytes \(12\.3 MB\) needed"):
            fresh(20, bytes_needed=12_345_678)


def test_a_full_disk_under_torch_is_explained() -> None:
    """torch.save loses the system's error: /dev/full is a disk without space."""
    torch = pytest.importorskip("torch")
    from megatron.checkpoint.files import disk_errors

    path = Path("/dev/full")
    with pytest.raises(RunError) as caught, disk_errors(path, needed=4_000_000):
        torch.save(torch.zeros(1_000_000), path)
    assert "cannot write /dev/full" in str(caught.value)
    assert "4,000,000 bytes (4.0 MB) needed" in str(caught.value)


def test_other_errors_pass_through() -> None:
    from megatron.checkpoint.files import disk_errors

    with pytest.raises(RuntimeError, match="boom"), disk_errors(Path("x")):
        raise RuntimeError("boom")
    with pytest.raises(FileNotFoundError), disk_errors(Path("x")):
        Path("/nonexistent/file").read_bytes()
