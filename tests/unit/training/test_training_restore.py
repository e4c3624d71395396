"""A run starts from one checkpoint, the same for all ranks, in whichever folder there is room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.bundles import write_bundle

from megatron.checkpoint.store import CheckpointStore
from megatron.errors import CheckpointError
from megatron.training import restore

LAYOUT = {"tensor_size": 1, "zero_stage": 1}


def saved(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    temporary = store.begin(3)
    bundle = write_bundle(temporary, step=3, domains=["a"], planner={}, guard={})
    store.commit(3, store.seal_files([bundle]), layout=LAYOUT)
    return store


def prepare(store: CheckpointStore, own: CheckpointStore, layout: dict[str, Any]) -> Any:
    runtime: Any = SimpleNamespace(rank=0, broadcast=lambda value: value)
    return restore.prepare_source(
        runtime,
        store,
        (store.path(3), store.read_manifest(store.path(3))),
        own=own,
        layout=layout,
        weights_only=False,
        optimizer=True,
        say=print,
    )


def converted(source: Path, target: Path, *, workers: int, state: Any) -> None:
    (target / "weights.json").write_text("{}")


def test_ranks_that_read_something_else_are_named(tmp_path: Path) -> None:
    store = saved(tmp_path)
    source: Any = SimpleNamespace(checkpoint=store.path(3))
    for others, named in (([], None), ([[3, 4, "x"]], "rank 1"), ([[2, 3, "x"]] * 2, "rank 1, 2")):
        runtime: Any = SimpleNamespace(gather=lambda own, others=others: [own, *others])
        if named is None:
            restore._check_same_on_all_ranks(runtime, source, [3, 3])
        else:
            with pytest.raises(CheckpointError, match=f"{named} read there differs"):
                restore._check_same_on_all_ranks(runtime, source, [3, 3])


def test_the_same_layout_needs_no_conversion(tmp_path: Path) -> None:
    store = saved(tmp_path)
    source = prepare(store, store, LAYOUT)
    assert (source.engine_files, source.universal) == (store.path(3), False)


def test_a_conversion_is_made_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron.training.conversion.convert_to_universal", converted)
    store = saved(tmp_path)
    for damaged, told in ((False, True), (False, False), (True, True)):
        if damaged:
            (store.path(3, "universal") / "weights.json").write_text("[]")
        source = prepare(store, store, {**LAYOUT, "tensor_size": 2})
        assert (source.engine_files, source.universal) == (store.path(3, "universal"), True)
        assert store.verify(source.engine_files) == []
        assert ("converting" in capsys.readouterr().out) == told


def test_a_conversion_goes_elsewhere_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.training.conversion.convert_to_universal", converted)
    store, own = saved(tmp_path / "theirs"), CheckpointStore(tmp_path / "own")
    monkeypatch.setattr(restore.os, "access", lambda path, mode: path != store.directory)
    source = prepare(store, own, {**LAYOUT, "tensor_size": 2})
    assert source.checkpoint == store.path(3)
    assert source.engine_files == own.path(3, "universal")
    # It is no checkpoint of the run's own.
    assert own.newest_valid() is None


def test_what_fails_on_rank_0_is_told_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path, *, workers: int, state: Any) -> None:
        raise CheckpointError("no way")

    monkeypatch.setattr("megatron.training.conversion.convert_to_universal", fails)
    store = saved(tmp_path)
    with pytest.raises(CheckpointError, match="no way"):
        prepare(store, store, {**LAYOUT, "tensor_size": 2})
    assert [path.name for path in tmp_path.iterdir() if "universal" in path.name] == []
