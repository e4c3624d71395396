"""How windows are read: packing, infilling and the curriculum, as keys."""

from __future__ import annotations

import math
import sys
import types

import pytest

from megatron.config.curriculum import Curriculum, CurriculumSchedule
from megatron.errors import ConfigError

LINEAR = "schedule_config: {total_curriculum_step: 40, difficulty_step: 8}"
BLOCK = "curriculum_learning: {enabled: true, min_difficulty: 16, max_difficulty: 128, "


def deepspeed_scheduler() -> type:
    """Return DeepSpeed's own scheduler, whose module alone is loaded."""
    from importlib.util import find_spec, module_from_spec, spec_from_file_location
    from pathlib import Path

    folder = Path(str(find_spec("deepspeed").origin)).parent / "runtime/data_pipeline"
    loaded = {}
    for name in ("constants", "curriculum_scheduler"):
        full = f"ds_pipeline.{name}"
        spec = spec_from_file_location(full, folder / f"{name}.py")
        loaded[full] = (module_from_spec(spec), spec)
    package = types.ModuleType("ds_pipeline")
    package.__path__ = [str(folder)]
    sys.modules["ds_pipeline"] = package
    try:
        for full, (module, spec) in loaded.items():
            sys.modules[full] = module
            spec.loader.exec_module(module)
        return loaded["ds_pipeline.curriculum_scheduler"][0].CurriculumScheduler
    finally:
        for name in [name for name in sys.modules if name.startswith("ds_pipeline")]:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("fixed_linear", {"total_curriculum_step": 40, "difficulty_step": 8}),
        ("fixed_linear", {"total_curriculum_step": 33, "difficulty_step": 24}),
        ("fixed_root", {"total_curriculum_step": 40, "difficulty_step": 8, "root_degree": 2}),
        ("fixed_discrete", {"difficulty": [16, 64, 100], "max_step": [5, 20]}),
    ],
)
@pytest.mark.parametrize("least", [8, 20])
def test_lengths_are_those_of_deepspeed(kind: str, config: dict, least: int) -> None:
    theirs = deepspeed_scheduler()(
        {
            "min_difficulty": least,
            "max_difficulty": 100,
            "schedule_type": kind,
            "schedule_config": config,
        }
    )
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    if "root_degree" in lists:
        lists["root_degree"] = float(lists["root_degree"])
    ours = Curriculum(
        min_difficulty=least,
        max_difficulty=100,
        schedule_type=kind,
        schedule_config=CurriculumSchedule(**lists),
    )
    expected = [theirs.get_difficulty(step) for step in range(1, 60)]
    assert ours.lengths(59, 128) == expected
    assert len(set(expected)) > 2


@pytest.mark.option("curriculum_learning")
def test_a_run_counts_the_tokens_of_its_shorter_rows(load) -> None:
    data = load(f"{BLOCK}{LINEAR}}}\n").data
    assert data.row_length(1, 128) == 16
    assert data.row_length(40, 128) == data.row_length(99, 128) == 128
    lengths = [data.row_length(step, 128) for step in range(1, 101)]
    assert data.tokens_per_row(100, 128) == sum(lengths)
    assert data.tokens_per_row(7, 128) == sum(lengths[:7])
    assert load().data.tokens_per_row(100, 128) == 12800
    off = load("curriculum_learning: {enabled: false, schedule_config: {total_curriculum_step: 9, "
               "difficulty_step: 8}}\n").data  # fmt: skip
    assert off.tokens_per_row(100, 128) == 12800
    assert math.isclose(data.row_length(20, 128), 72, abs_tol=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("curriculum_learning: {schedule_config: {difficulty_step: 8}}\n", "total_curriculum_step"),
        (f"{BLOCK}{LINEAR}, schedule_type: fixed_root}}\n", "needs root_degree"),
        (f"{BLOCK}schedule_type: custom, {LINEAR}}}\n", "schedule_type"),
        (f"{BLOCK.replace('128', '8')}{LINEAR}}}\n", "max_difficulty is below"),
        (f"{BLOCK.replace('128', '512')}{LINEAR}}}\n", "seq_length is 128"),
        (
            "curriculum_learning: {schedule_type: fixed_discrete, schedule_config: "
            "{difficulty: [8, 16], max_step: [4, 9]}}\n",
            "one entry fewer",
        ),
        (
            "curriculum_learning: {schedule_type: fixed_discrete, schedule_config: "
            "{difficulty: [8, 15], max_step: [4]}}\nmodel_parallel_size: 2\n"
            "sequence_parallel: true\n",
            "rows of 15 tokens",
        ),
        ("fim_rate: 0.5\n", "needs tokenizer_type and vocab_file to know <fim_prefix>"),
        ("fim_rate: 1.5\n", "fim_rate"),
        ("fim_rate: 0.5\nfim_prefix_token: 3\nfim_suffix_token: 3\n", "must differ"),
        (
            "fim_rate: 0.5\nfim_prefix_token: 1\nfim_suffix_token: 2\nfim_middle_token: 3\n",
            "to cut between characters",
        ),
        ("pack_impl: tight\n", "pack_impl"),
        ("data_impl: zip\n", "data_impl"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(load, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    assert said in str(error.value)


def test_labels_and_infilling_exclude_each_other(load) -> None:
    text = (
        "domains:\n  a: {train: x, train_labels: y}\nfim_rate: 0.5\nfim_level: token\n"
        "fim_prefix_token: 1\nfim_suffix_token: 2\nfim_middle_token: 3\n"
    )
    with pytest.raises(ConfigError, match="the labels of 'a' stay"):
        load(text, without=("domains",))
    text = "domains:\n  a: {train: [x, z], train_labels: y}\n"
    with pytest.raises(ConfigError, match="train_labels has 1 paths and train has 2"):
        load(text, without=("domains",))


def test_keys_are_kept_through_a_resolved_file(load, files) -> None:
    config = load(
        f"{BLOCK}{LINEAR}}}\npack_impl: unpacked\nallow_chopped: false\ndata_impl: cached\n"
        "fim_rate: 0.25\nfim_level: token\nfim_prefix_token: 1\nfim_suffix_token: 2\n"
        "fim_middle_token: 3\n"
    )
    assert config.data.pack_impl == "unpacked"
    assert not config.data.allow_chopped
    assert config.data.curriculum_learning.schedule_config.difficulty_step == 8
    again = files.load(config.resolved_yaml())
    assert again.data == config.data
    assert again.hash() == config.hash() != load().hash()
