"""Bit flips, truncations, missing, extra, swapped and foreign files: noticed, said, passed over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint import CheckpointStore, Manifest
from megatron.checkpoint.manifest import MANIFEST_NAME
from megatron.errors import CheckpointError

FILES = {
    "model.pt": bytes(range(256)) * 2,
    "zero/optimizer_0.pt": b"\x00" * 64 + b"state of rank 0",
    "zero/optimizer_1.pt": b"\x00" * 64 + b"state of rank 1",
    "state.json": b'{"step": 20}\n',
}
EVERYTHING = [*FILES, MANIFEST_NAME]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        temporary = made.begin(step)
        for name, content in FILES.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        made.commit(step, made.seal_files(temporary / name for name in FILES))
    assert made.verify(made.path(20)) == []
    return made


def falls_back(store: CheckpointStore, names: str) -> bool:
    """Whether step 20 is passed over for step 10, and the report says which file it was."""
    said: list[str] = []
    found = store.newest_valid(said.append)
    return (
        found is not None
        and found[1].step == 10
        and len(said) == 1
        and str(store.path(20)) in said[0]
        and names in said[0]
    )


@pytest.mark.parametrize("name", FILES)
def test_every_single_bit_flip_of_a_file_is_noticed(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / name
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8) if position % 16 == 0 else [position % 8]:
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            assert store.verify(store.path(20)), f"bit {bit} of byte {position}"
        if position % 50 == 0:
            assert falls_back(store, name)
    path.write_bytes(content)
    assert store.verify(store.path(20)) == []


def test_every_single_bit_flip_of_the_manifest_is_noticed(store: CheckpointStore) -> None:
    path = store.path(20) / MANIFEST_NAME
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                Manifest.from_bytes(bytes(flipped))
        if position % 50 == 0:
            path.write_bytes(flipped)
            assert falls_back(store, MANIFEST_NAME)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_truncation_and_extension_is_noticed(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / name
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert store.verify(store.path(20)), f"cut to {length} bytes"
    assert falls_back(store, name)
    for tail in (b"\x00", b"\n", b" ", content):
        path.write_bytes(content + tail)
        assert falls_back(store, name)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_missing_or_foreign_file_is_noticed(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / name
    os.rename(path, store.directory / "aside")
    assert falls_back(store, name)
    path.mkdir()
    assert falls_back(store, name)
    path.rmdir()
    path.symlink_to(store.directory / "aside")
    assert falls_back(store, name)
    path.unlink()
    os.mkfifo(path)
    assert falls_back(store, name)


@pytest.mark.parametrize("name", ["extra.pt", "zero/optimizer_2.pt", ".hidden", "deep/down/x"])
def test_an_extra_file_is_noticed(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert falls_back(store, name)


def test_files_of_equal_size_that_changed_places_are_noticed(store: CheckpointStore) -> None:
    zero = store.path(20) / "zero"
    os.rename(zero / "optimizer_0.pt", zero / "x")
    os.rename(zero / "optimizer_1.pt", zero / "optimizer_0.pt")
    os.rename(zero / "x", zero / "optimizer_1.pt")
    assert falls_back(store, "zero/optimizer_0.pt")


def test_another_steps_folder_under_this_name_is_noticed(store: CheckpointStore) -> None:
    shutil.rmtree(store.path(20))
    shutil.copytree(store.path(10), store.path(20))
    assert falls_back(store, "its manifest is of step 10")


def test_a_checkpoint_without_manifest_is_passed_over(store: CheckpointStore) -> None:
    """As DeepSpeed alone would leave one."""
    (store.path(20) / MANIFEST_NAME).unlink()
    assert falls_back(store, "manifest.json is missing (the save did not finish)")


def test_random_damage_is_always_noticed(store: CheckpointStore) -> None:
    random = np.random.Generator(np.random.Philox(7))
    damages: list[Callable[[Path, bytes], bytes]] = [
        lambda _, content: _splice(content, random.integers(len(content)), random.bytes(3)),
        lambda _, content: content[: random.integers(len(content))],
        lambda _, content: content[random.integers(1, len(content)) :],
        lambda _, content: bytes(len(content)),
        lambda _, content: random.bytes(len(content)),
    ]
    for trial in range(500):
        name = EVERYTHING[trial % len(EVERYTHING)]
        path = store.path(20) / name
        content = path.read_bytes()
        damaged = damages[random.integers(len(damages))](path, content)
        path.write_bytes(damaged)
        assert falls_back(store, name) or damaged == content
        path.write_bytes(content)


def _splice(content: bytes, at: int, piece: bytes) -> bytes:
    return (content[:at] + piece + content[at + len(piece) :])[: len(content)]


def test_when_all_are_damaged_none_is_offered(store: CheckpointStore) -> None:
    for step in (10, 20):
        (store.path(step) / "model.pt").write_bytes(b"")
    said: list[str] = []
    assert store.newest_valid(said.append) is None
    assert len(said) == 2
    assert "global_step20" in said[0]
    assert "model.pt has 0 bytes instead of 512" in said[1]


def test_every_damaged_file_is_listed(store: CheckpointStore) -> None:
    for name in FILES:
        (store.path(20) / name).unlink()
    (store.path(20) / "new").write_bytes(b"")
    assert store.verify(store.path(20)) == [
        *(f"{name} is missing" for name in sorted(FILES)),
        "new is not in the manifest",
    ]
    said: list[str] = []
    store.newest_valid(said.append)
    assert said[0].endswith("; and 2 more")


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(store: CheckpointStore) -> None:
    (store.path(20) / "model.pt").chmod(0)
    assert falls_back(store, "model.pt")
