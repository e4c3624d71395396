"""A run's name: appended to its folder, unless the command line says where the run lies."""

from __future__ import annotations

import pytest

from megatron.config import load_config
from megatron.errors import ConfigError

NAMED = "run_dir: runs/mine\nrun_name: aioli\n"


def test_it_is_appended(load):
    config = load(NAMED)
    assert config.run_dir == "runs/mine-aioli"
    assert config.checkpoint.save_dir == "runs/mine-aioli/checkpoints"
    assert config.checkpoint.run_name is None
    assert load("run_name: two\n").run_dir == "runs/default-two"
    assert load("run_dir: runs/mine/\nrun_name: b\n").run_dir == "runs/mine-b"


def test_the_command_line_names_a_folder_whole(load):
    assert load(NAMED, "run_dir=/elsewhere").run_dir == "/elsewhere"
    assert load(NAMED, "run_name=null").run_dir == "runs/mine"
    assert load(NAMED, "run_name=other").run_dir == "runs/mine-other"
    assert load(NAMED, "run_dir=x", "run_name=y").run_dir == "x-y"


def test_a_resolved_configuration_is_not_named_twice(load, tmp_path):
    config = load(NAMED)
    path = tmp_path / "config.yml"
    path.write_text(config.resolved_yaml())
    again = load_config([str(path)])
    assert again == config


@pytest.mark.parametrize("name", ["a/b", "''", "3 4", "'[x]'", "5"])
def test_what_cannot_end_a_folder_s_name_is_refused(load, name):
    with pytest.raises(ConfigError, match="run_name"):
        load(f"run_name: {name}\n")
