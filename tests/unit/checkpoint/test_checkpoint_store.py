from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import CheckpointStore, FileEntry, Manifest
from megatron.checkpoint.manifest import check_relative
from megatron.checkpoint.store import make_tag, parse_tag, store_in
from megatron.errors import CheckpointError


def save(store: CheckpointStore, step: int, kind: str = "", **details: Any) -> Path:
    temporary = store.begin(step, kind=kind)
    (temporary / "model.pt").write_bytes(b"weights of %d" % step)
    return store.commit(step, store.seal_files([temporary / "model.pt"]), kind=kind, **details)


def names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.directory))


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run/checkpoints")
    assert store.newest_valid() is None
    assert store.steps() == []
    details = {
        "layout": {"data": 2, "zero": 1},
        "config_hash": "abc",
        "fingerprints": {"code": "f00", "prose": ["a", 1]},
        "extra": {"threads": 1, "nested": {"x": [1.5, None, True, "ü"]}},
    }
    path = save(store, 7, **details)
    found = CheckpointStore(tmp_path / "run/checkpoints").newest_valid()
    assert found is not None
    assert found[0] == path == store.path(7)
    content = b"weights of 7"
    assert found[1] == Manifest(
        step=7,
        files={
            "model.pt": FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        },
        **details,  # type: ignore[arg-type]
    )
    assert found[1].total_bytes == len(content)
    assert (store.directory / "latest").read_text().strip() == "global_step7"
    assert store.read_manifest(path) == found[1]


def test_the_newest_by_number_is_chosen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (9, 100, 20):
        save(store, step)
    assert store.steps() == [9, 20, 100]
    found = store.newest_valid()
    assert found is not None
    assert found[1].step == 100
    found = store.newest_valid(at_most=99)
    assert found is not None
    assert found[1].step == 20
    assert store.newest_valid(at_most=8) is None


@pytest.mark.option("keep_last_n_checkpoints")
def test_only_the_last_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    (tmp_path / "global_step1").mkdir()  # not one of ours: no manifest
    (tmp_path / "notes").mkdir()
    for step in (10, 20, 30, 40):
        save(store, step)
    assert names(store) == ["global_step1", "global_step30", "global_step40", "latest", "notes"]
    with pytest.raises(CheckpointError, match=r"keep_last_n_checkpoints is 0: at least 1"):
        CheckpointStore(tmp_path, keep_last=0)


def test_an_older_step_saved_later_does_not_push_the_newest_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 50)
    save(store, 10)
    assert store.steps() == [50]


def test_companions_are_verified_but_never_offered(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 10)
    path = save(store, 10, "universal")
    assert path.name == "global_step10.universal"
    assert store.verify(path) == []
    assert store.read_manifest(path).step == 10
    found = store.newest_valid()
    assert found is not None
    assert found[0] == store.path(10)
    assert (tmp_path / "latest").read_text() == "global_step10\n"
    (path / "model.pt").write_bytes(b"?")
    assert store.verify(path) == ["model.pt has 1 bytes instead of 13"]
    save(store, 20)
    assert names(store) == ["global_step20", "latest"]


def test_a_save_may_be_begun_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(5) / "leftover").write_bytes(b"x")
    assert list(store.begin(5).iterdir()) == []
    store.abort(5)
    assert names(store) == []
    store.abort(5)


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, config_hash="old")
    save(store, 5, config_hash="new")
    found = store.newest_valid()
    assert found is not None
    assert found[1].config_hash == "new"
    assert names(store) == ["global_step5", "latest"]


def test_ranks_seal_their_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    temporary = CheckpointStore("checkpoints").begin(3)
    entries: dict[str, dict[str, Any]] = {}
    for rank in range(3):
        path = temporary / "zero" / f"rank_{rank}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"r" * rank)
        # Another process: it has not called begin, and may name the folder otherwise.
        entries |= CheckpointStore(tmp_path / "checkpoints").seal_files([path])
    assert sorted(entries) == ["zero/rank_0.pt", "zero/rank_1.pt", "zero/rank_2.pt"]
    assert entries["zero/rank_2.pt"]["size"] == 2
    CheckpointStore("checkpoints").commit(3, entries)
    assert CheckpointStore("checkpoints").verify("checkpoints/global_step3") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tmp: (tmp / "b").unlink(), "b is missing"),
        (lambda tmp: (tmp / "c").write_bytes(b""), "c is not in the manifest"),
        (lambda tmp: (tmp / "b").write_bytes(b"longer"), "b has 6 bytes instead of 1"),
    ],
)
def test_a_commit_that_does_not_fit_its_files_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    store = CheckpointStore(tmp_path)
    temporary = store.begin(4)
    for name in "ab":
        (temporary / name).write_bytes(b"x")
    entries = store.seal_files([temporary / "a", temporary / "b"])
    change(temporary)
    with pytest.raises(CheckpointError, match=message):
        store.commit(4, entries)
    assert store.steps() == []


@pytest.mark.parametrize(
    "path", ["outside", "global_step3/a", "global_step3.tmp", "x.tmp/a", "global_step3.tmp/../a"]
)
def test_only_files_of_a_save_are_sealed(tmp_path: Path, path: str) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(3)
    with pytest.raises(CheckpointError, match="is not a file of a checkpoint that is being"):
        store.seal_files([tmp_path / path])


@pytest.mark.parametrize(
    "tag",
    [
        "",
        ".",
        "..",
        "../global_step1",
        "/etc/global_step1",
        "global_step1/../../x",
        "global_step-1",
        "global_step01",
        "global_step1.tmp",
        "global_step1.trash",
        "global_step1.replaced",
        "global_step1\n",
        "global_step１",
        "global_step",
        "global_step1\0",
        "latest",
    ],
)
def test_a_tag_names_nothing_but_a_checkpoint(tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
        CheckpointStore(tmp_path).path_of_tag(tag)


def test_tags_are_steps_and_kinds() -> None:
    assert parse_tag("global_step120") == (120, "")
    assert parse_tag("global_step0.universal") == (0, "universal")
    assert make_tag(3) == "global_step3"
    for step, kind in [(-1, ""), (1, "tmp"), (1, "../x"), (1, "A")]:
        with pytest.raises(CheckpointError):
            make_tag(step, kind)


def test_sweeping_puts_things_in_order(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.sweep()
    save(store, 10)
    (store.begin(20) / "half").write_bytes(b"")
    (tmp_path / "global_step9.trash").mkdir()
    (tmp_path / "other.tmp").mkdir()
    (tmp_path / "latest").write_text("../../somewhere\n")
    store.sweep()
    assert names(store) == ["global_step10", "latest", "other.tmp"]
    assert (tmp_path / "latest").read_text() == "global_step10\n"


def test_sweeping_leaves_a_latest_that_someone_set_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    save(store, 20)
    (tmp_path / "latest").write_text("global_step10")
    store.sweep()
    assert (tmp_path / "latest").read_text() == "global_step10"


def test_manifests_have_one_spelling() -> None:
    manifest = Manifest(
        step=1,
        files={"b": FileEntry(size=1, sha256="x"), "a": FileEntry(size=2, sha256="y")},
        extra={"10": 1, "9": (1, 2)},
    )
    raw = manifest.to_bytes()
    again = Manifest.from_bytes(raw)
    assert again.to_bytes() == raw
    assert again.extra == {"10": 1, "9": [1, 2]}
    assert Manifest(step=1, files={}, extra={10: 1, 9: 2}).to_bytes()
    body = json.loads(raw)
    for changed in (
        json.dumps(body).encode(),
        raw + b"\n",
        raw.replace(b'"step": 1', b'"step": 2'),
    ):
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.from_bytes(changed)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100000, b'{"sha256":1}']
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.from_bytes(raw)


def _signed(body: dict[str, Any]) -> bytes:
    """Spell a manifest that this release would not write, with a right checksum."""

    def spell(content: dict[str, Any]) -> bytes:
        return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"

    return spell({**body, "sha256": hashlib.sha256(spell(body)).hexdigest()})


def test_another_version_says_so() -> None:
    with pytest.raises(CheckpointError, match="version 2, this software reads version 1"):
        Manifest.from_bytes(_signed({"version": 2}))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "", "a\\b", "a\0"]
)
def test_a_manifest_names_only_files_inside(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a path inside"):
        check_relative(name)
    with pytest.raises(CheckpointError, match="not a path inside"):
        Manifest(step=1, files={name: FileEntry(size=0, sha256="")}).to_bytes()
    body = {
        "version": 1,
        "step": 1,
        "layout": {},
        "config_hash": "",
        "fingerprints": {},
        "extra": {},
        "files": {name: {"size": 0, "sha256": ""}},
    }
    with pytest.raises(CheckpointError, match="not a path inside"):
        Manifest.from_bytes(_signed(body))


def test_a_manifest_holds_json_only() -> None:
    for value in (float("nan"), object(), b"x"):
        with pytest.raises(CheckpointError, match="the manifest of step 1"):
            Manifest(step=1, files={}, extra={"x": value}).to_bytes()


def test_a_run_s_folder_stands_for_its_checkpoints(tmp_path: Path) -> None:
    assert store_in(tmp_path).directory == tmp_path
    inner = tmp_path / "checkpoints"
    inner.mkdir()
    assert store_in(tmp_path).directory == inner
    (tmp_path / "global_step3").mkdir()
    assert store_in(tmp_path).directory == tmp_path, "what is named has checkpoints of its own"
