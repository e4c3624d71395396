"""GPT-NeoX's keys for launchers, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron.mixing  # noqa: F401  (registers the methods)
from megatron.config import Config, load_config
from megatron.errors import ConfigError
from tests.support.runs import config as small


def load(tmp_path: Path, *overrides: str, **keys: Any) -> Config:
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(small(tmp_path, tmp_path / "run", **keys)))
    return load_config([str(file)], overrides=list(overrides))


@pytest.mark.option("deepspeed_mpi", "deepspeed_slurm", "force_multi")
@pytest.mark.parametrize(
    ("keys", "launcher"),
    [
        ({}, None),
        ({"deepspeed_mpi": False, "deepspeed_slurm": None}, None),
        ({"deepspeed_mpi": True}, "openmpi"),
        ({"deepspeed_slurm": True, "launcher": "Slurm"}, "slurm"),
        ({"launcher": "PDSH", "force_multi": True, "num_nodes": -1}, "pdsh"),
        ({"launcher": "OpenMPI", "no_ssh_check": True, "detect_nvlink_pairs": True}, "openmpi"),
    ],
)
def test_keys_of_gpt_neox_name_the_launcher(
    tmp_path: Path, keys: dict[str, Any], launcher: str | None
) -> None:
    config = load(tmp_path, **keys)
    assert config.launch.launcher == launcher
    again = tmp_path / "again.yml"
    again.write_text(config.resolved_yaml())
    assert load_config([str(again)]).launch == config.launch


def test_job_scripts_override_the_launcher(tmp_path: Path) -> None:
    config = load(tmp_path, "launcher=slurm", deepspeed_mpi=True, account="me", comment="a b")
    assert (config.launch.launcher, config.launch.account) == ("slurm", "me")
    assert config.launch.comment == "a b"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"deepspeed_slurm": True, "launcher": "pdsh"}, "contradicts"),
        ({"launcher": "mvapich"}, "launcher"),
        ({"deepspeed_mpi": "yes"}, "should be true or false"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **keys)
