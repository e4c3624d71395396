"""Options whose whole effect is in what they are turned into, each against a plain run's."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron.config import deepspeed_config
from megatron.config.canonical import accepted_keys
from megatron.config.parity import upstream_keys, verdict
from megatron.config.parity_page import marked_tests
from megatron.config.parity_tools import NEOX, ODM, TOOLS
from megatron.model.init import initializer
from megatron.monitor.build import chart_sinks
from megatron.training.inference_options import run_tokenizer
from megatron.training.plan.command import assumptions
from megatron.training.schedule import run_schedule

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.option("batch_size", "gas", "clip_grad", "data_types", "fp32_allreduce")
@pytest.mark.option("zero_reduce_scatter", "zero_contiguous_gradients")
@pytest.mark.option("zero_reduce_bucket_size", "zero_allgather_bucket_size")
def test_other_spellings_reach_deepspeed(load):
    def dictionary(text: str = "", without: tuple[str, ...] = ()) -> dict[str, Any]:
        config = load(text, without=without)
        micro = config.batch.train_micro_batch_size_per_gpu or 1
        steps = config.batch.gradient_accumulation_steps or 1
        return deepspeed_config(config, micro=micro, accumulation=steps, data_size=1)

    plain = dictionary()
    by_hand = dictionary("batch_size: 3\ngas: 2\n", ("train_micro_batch_size_per_gpu",))
    assert by_hand["train_micro_batch_size_per_gpu"] == 3
    assert by_hand["gradient_accumulation_steps"] == 2
    assert dictionary("clip_grad: 0.5\n")["gradient_clipping"] == 0.5
    assert plain["gradient_clipping"] != 0.5
    types = dictionary("data_types: {grad_accum_dtype: fp32}\n")["data_types"]
    assert types == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in plain
    assert dictionary("fp32_allreduce: true\n")["communication_data_type"] == "fp32"
    for key, option, value in (
        ("zero_reduce_scatter", "reduce_scatter", False),
        ("zero_contiguous_gradients", "contiguous_gradients", False),
        ("zero_reduce_bucket_size", "reduce_bucket_size", 77_000),
        ("zero_allgather_bucket_size", "allgather_bucket_size", 78_000),
    ):
        found = dictionary(f"{key}: {json.dumps(value)}\n")["zero_optimization"]
        assert found[option] == value != plain["zero_optimization"].get(option)


@pytest.mark.option("bias_gelu_fusion")
def test_the_fused_gelu_is_the_tanh_approximation(load):
    assert load("bias_gelu_fusion: true\n").model.activation == "gelu_tanh"
    assert load("bias_gelu_fusion: false\n").model.activation == "gelu"
    assert load("bias_gelu_fusion: true\nactivation: swiglu\n").model.activation == "swiglu"


@pytest.mark.option("intermediate_size")
def test_the_width_of_a_gated_layer_may_be_given_three_times_over(load):
    """As in GPT-NeoX's Llama files: 32,768 is Llama 7B's 11,008."""
    sizes = "num_layers: 1\nhidden_size: 4096\nnum_attention_heads: 32\nactivation: swiglu\n"
    without = ("num_layers", "hidden_size", "num_attention_heads")
    theirs = load(sizes + "intermediate_size: 32768\nmlp_multiple_of: 256\n", without=without)
    assert theirs.model.intermediate_size == 11_008
    assert theirs.ignored == (
        "intermediate_size: 32768 is three times the width, as in GPT-NeoX: it is 11008",
    )
    own = load(sizes + "intermediate_size: 11008\n", without=without)
    assert (own.model.intermediate_size, own.ignored) == (11_008, ())


@pytest.mark.option("max_position_embeddings", "train_iters")
def test_the_longest_context_is_not_the_trained_one(load):
    config = load("max_position_embeddings: 512\n", "train_iters=7")
    assert (config.model.max_position_embeddings, config.model.seq_length) == (512, 128)
    assert config.training.train_iters == 7


@pytest.mark.option("lr", "min_lr", "lr_decay_style")
def test_the_learning_rate_follows_its_keys(load):
    def rates(text: str) -> list[float]:
        schedule = run_schedule(load(text, "warmup=0"))
        return [schedule.rate(step) for step in (1, 50, 100)]

    cosine = rates("lr: 1e-3\nlr_decay_style: cosine\nmin_lr: 1e-4\n")
    assert cosine[0] == pytest.approx(1e-3, rel=1e-2)
    assert cosine[-1] == pytest.approx(1e-4, rel=1e-2)
    assert rates("lr_decay_style: constant\n") == pytest.approx([1e-3] * 3)
    assert rates("lr_decay_style: cosine\n")[-1] < 1e-5


@pytest.mark.option("lr_formula", "wsd_decay_fraction", "wsd_decay_shape", "warmup_iters")
@pytest.mark.option("lr_decay_fraction", "lr_decay_iters")
@pytest.mark.parametrize(
    ("text", "step", "rate"),
    [
        # A peak of 1e-3 and 100 steps; the rate is that behind so many less one.
        ("lr_decay_style: wsd\n", 81, 1e-3),
        ("lr_decay_style: wsd\nwsd_decay_fraction: 0.4\n", 81, 5e-4),
        ("lr_decay_style: wsd\nwsd_decay_fraction: 0.4\nwsd_decay_shape: sqrt\n", 81, 2.93e-4),
        ("lr_decay_style: linear\n", 26, 7.5e-4),
        ("lr_decay_style: linear\nlr_decay_iters: 50\n", 26, 5e-4),
        ("lr_decay_style: linear\nlr_decay_fraction: 0.5\n", 26, 5e-4),
        ("lr_decay_style: linear\nwarmup_iters: 50\n", 26, 5e-4),
        ("lr_decay_style: linear\nwarmup_iters: 10\n", 76, 2.78e-4),
        # The fork divides by all steps, the warm-up's among them.
        ("lr_decay_style: linear\nwarmup_iters: 10\nlr_formula: fork\n", 76, 3.5e-4),
    ],
)
def test_the_run_has_the_schedule_of_its_keys(load, text, step, rate):
    schedule = run_schedule(load(text + "lr: 1e-3\nmin_lr: 0\n", "train_iters=100", "warmup=0"))
    assert schedule.rate(step) == pytest.approx(rate, rel=0.02)


@pytest.mark.option("tokenizer_type", "vocab_file", "merge_file")
def test_the_run_has_the_tokenizer_of_its_keys(load, tmp_path):
    letters = [chr(0x120 + code) if code < 33 else chr(code) for code in range(127)]
    for name, extra in (("v", ["ab", "bc"]), ("w", ["bc", "ab"])):
        ids = {text: number for number, text in enumerate([*letters, *extra, "<|endoftext|>"])}
        (tmp_path / f"{name}.json").write_text(json.dumps(ids))
    (tmp_path / "m.txt").write_text("#version: 0.2\na b\nb c\n")
    (tmp_path / "n.txt").write_text("#version: 0.2\nb c\na b\n")

    def tokens(vocab: str, merges: str) -> list[int]:
        files = f"vocab_file: {tmp_path / vocab}.json\nmerge_file: {tmp_path / merges}.txt\n"
        config = load(f"tokenizer_type: GPT2BPETokenizer\n{files}")
        return run_tokenizer(config, "this test").encode("abc")

    ab, bc, a, c = 127, 128, ord("a"), ord("c")
    assert tokens("v", "m") == [ab, c]
    assert tokens("v", "n") == [a, bc]
    assert tokens("w", "m") == [bc, c]
    plain = run_tokenizer(load("tokenizer_type: CharLevelTokenizer\n"), "this test")
    assert plain.encode("abc") == [a, ord("b"), c]


@pytest.mark.option("init_method_std")
def test_initial_weights_deviate_as_told(load):
    for std in (0.02, 0.5):
        draw = initializer("normal", load(f"init_method_std: {std}\n").model)
        drawn = draw((64, 64), np.random.default_rng(0))
        assert float(drawn.std()) == pytest.approx(std, rel=0.05)


@pytest.mark.option("save", "log_dir")
def test_folders_are_those_that_are_named(load):
    config = load("save: there/checkpoints\nlog_dir: there/logs\n")
    assert (config.checkpoint.save, config.log_dir) == ("there/checkpoints", "there/logs")
    assert load().log_dir == "runs/default/logs"


@pytest.mark.option("save_iters")
def test_steps_to_save_at_may_be_listed(load):
    assert load("save_iters: [3, 5]\n").checkpoint.extra_save_iters == (3, 5)


@pytest.mark.option("peak_theoretical_tflops")
def test_the_peak_of_a_device_is_what_the_plan_reckons_with(load):
    flags = ("device_memory", "peak_tflops", "utilisation", "tokens", "ranks_per_node", "bandwidth")
    arguments = Namespace(**dict.fromkeys(flags))
    config = load("peak_theoretical_tflops: 312\n")
    assert assumptions(config, arguments, world_size=8, on_cpu=False).peak_flops == 312e12


class Recorder:
    """Stands for a chart service's client: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Recorder:
            self.told.append((name, args, options))
            return self

        return call


@pytest.mark.option("use_wandb", "wandb_project", "wandb_team", "wandb_run_name", "wandb_host")
@pytest.mark.option("use_comet", "wandb_group")
@pytest.mark.option("comet_project", "comet_workspace", "comet_experiment_name")
@pytest.mark.option("comet_tags", "comet_others")
def test_chart_services_are_told_what_the_keys_say(load, tmp_path, monkeypatch):
    given = {
        "wandb_project": "p1", "wandb_team": "t1", "wandb_run_name": "r1",
        "wandb_host": "https://own.example", "wandb_group": "g1",
        "comet_project": "p2", "comet_workspace": "w2",
        "comet_experiment_name": "e2", "comet_tags": ["g2"], "comet_others": {"k2": "v2"},
    }  # fmt: skip
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in given.items())
    logging = load(text + "use_wandb: true\nuse_comet: true\n").logging
    made: list[dict[str, Any]] = []
    for name, sink in (("wandb", "WandbSink"), ("comet", "CometSink")):
        module = ModuleType(f"megatron.monitor.{name}")

        def keep(folder: Path, **options: Any) -> object:
            made.append(options)
            return object()

        setattr(module, sink, keep)
        monkeypatch.setitem(sys.modules, f"megatron.monitor.{name}", module)
    chart_sinks(logging, tmp_path, 1)
    wandb, comet = made
    assert (wandb["project"], wandb["entity"], wandb["name"]) == ("p1", "t1", "r1")
    assert wandb["group"] == "g1"
    assert wandb["host"] == "https://own.example"
    assert (comet["project"], comet["workspace"], comet["name"]) == ("p2", "w2", "e2")
    assert (list(comet["tags"]), comet["others"]) == (["g2"], {"k2": "v2"})


def test_every_option_that_works_has_a_test_that_shows_it():
    shown = marked_tests(ROOT)
    keys = {key for system in upstream_keys().values() for key in system}
    promised = {key for key in keys if verdict(key).promised}
    assert sorted(promised - shown.keys()) == []
    assert sorted(shown.keys() - keys - set(accepted_keys())) == []


def test_every_key_has_one_verdict():
    for system, count in (("online-data-mixing", 208), ("gpt-neox", 318)):
        keys = upstream_keys()[system]
        assert len(keys) == count
        assert all(verdict(key).text for key in keys)
    with pytest.raises(KeyError):
        verdict("no_such_key")


def test_tools_name_scripts_and_flags_that_exist():
    assert {tool.system for tool in TOOLS} == {ODM, NEOX}
    for tool in TOOLS:
        assert bool(tool.ours) is (tool.state != "refused"), tool.path
        assert tool.ours or tool.reason, tool.path
        assert not tool.ours or (ROOT / tool.ours).is_file(), tool.ours
