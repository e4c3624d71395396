"""Which way a checkpoint is loaded, and what the conversion's command says of what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.bundles import write_bundle

from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.store import CheckpointStore
from megatron.errors import CheckpointError, RunError
from megatron.training.compatible import check_form, how_to_load
from megatron.training.convert import choose, convert, describe

LAYOUT = {
    "data_size": 2,
    "tensor_size": 1,
    "pipe_size": 1,
    "stage_bounds": [0, 5],
    "padded_vocab_size": 128,
    "zero_stage": 1,
    "precision": "fp32",
}
OTHERS = [
    {"data_size": 4},
    {"tensor_size": 2},
    {"pipe_size": 2, "stage_bounds": [0, 2, 5]},
    {"stage_bounds": [0, 3, 5]},
    {"padded_vocab_size": 256},
    {"zero_stage": 3},
    {"precision": "bf16"},
]


def manifest(**layout: Any) -> Manifest:
    return Manifest(step=3, files={}, layout={**LAYOUT, **layout})


def test_the_same_layout_is_loaded_as_it_is() -> None:
    assert how_to_load(manifest(), LAYOUT, weights_only=False) == "directly"
    assert how_to_load(manifest(), LAYOUT, weights_only=True) == "directly"


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_another_layout_is_converted(change: dict[str, Any]) -> None:
    assert how_to_load(manifest(**change), LAYOUT, weights_only=False) == "convert"
    assert how_to_load(manifest(), {**LAYOUT, **change}, weights_only=False) == "convert"


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_weights_alone_need_only_lie_in_the_same_files(change: dict[str, Any]) -> None:
    whole = change.keys() <= {"data_size", "precision"}
    expected = "directly" if whole else "convert"
    assert how_to_load(manifest(**change), LAYOUT, weights_only=True) == expected
    both = how_to_load(manifest(zero_stage=3), {**LAYOUT, "zero_stage": 3}, weights_only=True)
    assert both == "convert"


def test_a_universal_checkpoint_fits_every_layout() -> None:
    for change in ({}, *OTHERS):
        way = how_to_load(manifest(universal=True), {**LAYOUT, **change}, weights_only=False)
        assert way == "universal"
    with pytest.raises(CheckpointError, match="ZeRO stage 0"):
        how_to_load(manifest(universal=True), {**LAYOUT, "zero_stage": 0}, weights_only=False)


def test_the_form_of_what_is_loaded_is_announced() -> None:
    check_form(manifest(), "x", load_universal=False)
    check_form(manifest(universal=True), "x", load_universal=True)
    with pytest.raises(CheckpointError, match=r"convert it with tools/convert_checkpoint\.py"):
        check_form(manifest(), "x", load_universal=True)
    with pytest.raises(CheckpointError, match="load_universal: true"):
        check_form(manifest(universal=True), "x", load_universal=False)


def save(folder: Path, step: int, **layout: Any) -> CheckpointStore:
    store = CheckpointStore(folder)
    temporary = store.begin(step)
    bundle = write_bundle(temporary, step=step, domains=["a", "b"], planner={}, guard={})
    model = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    store.commit(
        step, store.seal_files([bundle]), layout={**LAYOUT, **layout}, extra={"model": model}
    )
    return store


def test_what_may_be_named(tmp_path: Path) -> None:
    store = save(tmp_path / "checkpoints", 3)
    save(tmp_path / "checkpoints", 6)
    said: list[str] = []
    for given, step in ((tmp_path, 6), (store.directory, 6), (store.path(3), 3)):
        assert choose(given, None, verified=True, say=said.append)[0] == store.path(step)
    assert choose(tmp_path, 3, verified=True, say=said.append)[1].step == 3
    assert said == []
    (store.path(6) / "neomix_state.json").write_text("{}")
    assert choose(tmp_path, None, verified=True, say=said.append)[1].step == 3
    assert "global_step6 is passed over" in said[0]
    with pytest.raises(CheckpointError, match="global_step6 is incomplete or damaged"):
        choose(tmp_path, 6, verified=True, say=said.append)


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    store = save(tmp_path / "run" / "checkpoints", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "global_step9").mkdir()
    for given, step, message in (
        (tmp_path / "none", None, "is no folder"),
        (tmp_path / "empty", None, "holds no checkpoint"),
        (tmp_path / "global_step9", None, "manifest.json is missing"),
        (tmp_path / "run", 4, "no checkpoint of step 4; it has 3"),
        (store.path(3), 4, "--step 4 contradicts"),
    ):
        with pytest.raises(CheckpointError, match=message):
            choose(given, step, verified=True, say=print)


def test_the_description(tmp_path: Path) -> None:
    store = save(tmp_path, 3, tensor_size=4)
    path = store.path(3)
    text = "\n".join(describe(path, store.read_manifest(path)))
    for part in ("step 3", "tensor 4 × pipeline 1 × data 2", "ZeRO stage 1", "domains: a, b"):
        assert part in text
    # 2 blocks of 12·8² + 13·8 numbers, the final norm's 16 and 10 rows of 8.
    assert "1,840 parameters, 2 layers of 8, vocabulary 10" in text


def test_what_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    def refused(given: Path, message: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            convert(given, tmp_path / "out", step=None, workers=1, say=print)
        assert not list((tmp_path / "out").glob("global_step*.tmp"))

    refused(save(tmp_path / "universal", 3, universal=True).directory, "universal format already")
    refused(save(tmp_path / "stage", 3, zero_stage=0).directory, "ZeRO stage 0")
    refused(save(tmp_path / "first", 0).directory, "step 0")
    save(tmp_path / "out", 5)
    refused(save(tmp_path / "there", 5).directory, "global_step5 is there already")
    monkeypatch.setattr("megatron.checkpoint.files.free_bytes", lambda path: 10)
    refused(save(tmp_path / "space", 7).directory, "not enough disk space", RunError)
