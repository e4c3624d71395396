"""The ready configurations: each is read without a complaint, with the files it goes with."""

from __future__ import annotations

import itertools

import pytest
from support.source import ROOT

import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
from megatron.config import load_config
from megatron.errors import ConfigError

CONFIGS = ROOT / "configs"


def names(folder: str) -> list[str]:
    return [f"{folder}/{path.stem}" for path in sorted((CONFIGS / folder).glob("*.yml"))]


def load(*files: str):
    return load_config(list(files), conf_dir=str(CONFIGS))


def test_the_quickstart_trains_a_small_neox_on_two_ranks():
    config = load("local/quickstart", "mixing/odm")
    assert config.mixing.method == "odm"
    assert config.launch.num_gpus == 2
    assert not config.ignored
    assert config.training.eval_interval <= config.training.train_iters
    assert config.training.train_iters % config.training.eval_interval == 0
    assert len(config.domains) >= 5


@pytest.mark.parametrize(
    ("local", "mixing"), list(itertools.product(names("local"), names("mixing"))), ids="+".join
)
def test_every_local_configuration_goes_with_every_mixture(local, mixing):
    assert not load(local, mixing).ignored


@pytest.mark.parametrize("parallel", names("parallel"))
def test_every_layout_goes_with_the_quickstart_or_a_model_of_a_billion(parallel):
    # The quickstart's four heads and layers do not divide by eight.
    files = ("models/1B", "data/slimpajama") if "8" in parallel else ("local/quickstart",)
    if parallel.startswith("parallel/ep"):  # of a model that has experts
        files = ("models/125M_moe", "data/slimpajama")
    plain = load(*files, "mixing/odm")
    config = load(*files, "mixing/odm", parallel)
    assert config != plain
    assert not config.ignored


@pytest.mark.parametrize(
    ("parallel", "sizes"),
    [
        (("tp2",), (2, 1)),
        (("tp4", "sequence_parallel"), (4, 1)),
        (("pp2", "recompute"), (1, 2)),
        (("tp2", "pp4", "zero1", "bf16"), (2, 4)),
    ],
)
def test_layouts_are_put_together(parallel, sizes):
    config = load("local/quickstart", "mixing/odm", *(f"parallel/{name}" for name in parallel))
    assert (config.parallel.model_parallel_size, config.parallel.stages) == sizes


@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero2_offload"])
def test_a_pipeline_with_divided_gradients_is_refused(stage):
    with pytest.raises(ConfigError, match="a pipeline keeps its gradients and weights whole"):
        load("local/quickstart", "mixing/odm", "parallel/pp2", f"parallel/{stage}")


@pytest.mark.parametrize("data", names("data"))
def test_every_corpus_goes_with_a_ready_model(data):
    config = load("models/160m", data, "mixing/odm")
    assert config.domains
    assert config.tokenizer.vocab_file
