"""Every ready configuration passes what `--check` and `--plan` do, in this process."""

from __future__ import annotations

import zlib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import megatron.mixing  # noqa: F401  (registers the methods)
from megatron.config import Config, load_config
from megatron.data.writer import TokenWriter
from megatron.errors import NeomixError
from megatron.training.check import check
from megatron.training.plan.command import plan

ROOT = Path(__file__).resolve().parents[3]
PRESETS = ROOT / "configs"
DEVICES = 512
# Text becomes data elsewhere: the files of a tokenizer are not there.
OVERRIDES = ("tokenizer_type=null", "vocab_file=null", "merge_file=null", "vocab_size=50257")
DATA_OF = {"pile": "data/pile_22", "redpajama": "data/redpajama"}
PLAN_FLAGS = (
    "device_memory", "peak_tflops", "utilisation", "tokens", "ranks_per_node", "bandwidth",
)  # fmt: skip
# What needs an earlier run is trained whole in tests/e2e/test_every_method.py.
EARLIER_RUN = "runs/quickstart"


def presets(folder: str) -> list[str]:
    return sorted(
        str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.glob(f"{folder}/*.yml")
    )


def write(prefix: str, seed: int, tokens: int) -> None:
    with TokenWriter(prefix, np.uint16) as writer:
        drawn = np.random.default_rng(seed).integers(0, 50_000, tokens)
        writer.add_many(drawn, [1_000] * (tokens // 1_000))


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load presets, give every domain data, and do what `--check` and `--plan` do."""
    monkeypatch.chdir(tmp_path)
    # A checkpoint of 175 billion parameters is larger than a test machine's disk.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**18))

    def do(*names: str, ranks: int | None = None) -> Config:
        (tmp_path / "own.yml").write_text("domains: {own: {train: own, weight: 1}}\n")
        files = [str(PRESETS / f"{name}.yml") for name in names]
        if not any("domains:" in Path(file).read_text() for file in files):
            files.append("own.yml")
        config = load_config(files, overrides=OVERRIDES)
        for domain in config.domains.values():
            size = 400_000 if len(config.domains) == 1 else 100_000 if domain.uses_split else 20_000
            for prefix in {*domain.train, *(domain.valid or ()), *(domain.test or ())}:
                write(prefix, zlib.crc32(prefix.encode()), size)
        replica = config.parallel.model_parallel_size * config.parallel.stages
        world = ranks or max(DEVICES // replica * replica, replica)
        lines: list[str] = []
        flags = dict.fromkeys(PLAN_FLAGS)
        arguments = Namespace(world_size=world, **flags)
        assert plan(config, arguments, launched=lambda: pytest.fail("asked"), say=lines.append) == 0
        assert any("GiB" in line for line in lines)
        assert check(config, world_size=world, gpus=8, say=lines.append) == 0
        return config

    return do


@pytest.mark.parametrize("name", presets("models"))
def test_models(checked, name):
    config = checked(name, ranks=8 if "odm_" in name else None)
    assert config.ignored == ()


@pytest.mark.parametrize("name", presets("data"))
def test_data(checked, name):
    checked("models/14m", name)


@pytest.mark.parametrize("name", presets("data/weights"))
def test_weights_are_of_the_domains_they_name(checked, name):
    config = checked("models/14m", DATA_OF[Path(name).name.partition("_")[0]], name)
    weights = [domain.weight for domain in config.domains.values()]
    assert config.mixing.weights == "given"
    assert all(weight is not None and weight > 0 for weight in weights)
    # (One of the published lists sums to 1.0203.)
    assert sum(weight or 0 for weight in weights) == pytest.approx(1, abs=0.025)


@pytest.mark.parametrize("name", presets("mixing"))
def test_mixing(checked, name):
    names = ("models/14m", "data/redpajama", "data/weights/redpajama_baseline", name)
    text = (PRESETS / f"{name}.yml").read_text()
    if "weights: uniform" in text or "weights: natural" in text or "weights: temp" in text:
        names = ("models/14m", "data/redpajama", name)
    if EARLIER_RUN in text:
        with pytest.raises(NeomixError, match=EARLIER_RUN):
            checked(*names, ranks=1)
    else:
        checked(*names, ranks=1)


@pytest.mark.parametrize("name", presets("parallel"))
def test_parallel(checked, name):
    shares_experts = name.startswith("parallel/ep")
    checked("models/mixtral_8x7B" if shares_experts else "models/6-7B", name)


@pytest.mark.parametrize("name", presets("aioli"))
def test_aioli(checked, name):
    assert checked(name, ranks=1).mixing.method == ("static" if "instr" in name else "aioli")


def test_odm_runs_as_released(checked):
    """Its four sizes with its data, weights and rule, on its eight devices."""
    common = ("data/pile_22", "data/weights/pile_original", "mixing/odm_released", "parallel/zero1")
    checked("models/odm_1B", *common, ranks=8)
    sizes = {}
    for size in ("160m", "410m", "1B", "3B"):
        names = [str(PRESETS / f"{name}.yml") for name in (f"models/odm_{size}", *common)]
        config = load_config(names, overrides=OVERRIDES)
        sizes[size] = (config.model.num_layers, config.model.hidden_size, config.optimizer.lr)
        assert (config.mixing.method, config.mixing.unit) == ("smoothed_mean", "micro_batch")
        assert config.domains["pile_cc"].weight == 0.1811
    assert sizes == {
        "160m": (12, 768, 6e-4),
        "410m": (24, 1024, 3e-4),
        "1B": (16, 2048, 2.5e-4),
        "3B": (32, 2560, 1.6e-4),
    }
