"""Blocks and keys that GPT-NeoX hands to DeepSpeed, and what they become here."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import Config, deepspeed_config, load_config
from megatron.errors import ConfigError
from megatron.training.schedule import run_schedule


def dictionary(config: Config, data_size: int = 4) -> dict[str, Any]:
    return deepspeed_config(config, micro=4, accumulation=1, data_size=data_size)


@pytest.mark.option("amp")
def test_amp_is_half_precision_with_full_masters(load):
    plain = load("amp: {enabled: true, opt_level: O2, loss_scale: dynamic, min_loss_scale: 4}\n")
    assert (plain.precision, plain.fp16.loss_scale, plain.fp16.min_loss_scale) == ("fp16", 0.0, 4)
    assert plain.ignored == ()
    assert load("amp: {enabled: true, opt_level: O0}\n").precision == "fp32"
    scaled = load("amp: {enabled: true, loss_scale: 128.0, keep_batchnorm_fp32: true}\n")
    assert (scaled.precision, scaled.fp16.loss_scale) == ("fp16", 128.0)
    assert [text.split(":")[0] for text in scaled.ignored] == [
        "amp.opt_level",
        "amp.keep_batchnorm_fp32",
    ]
    assert any(
        "run as O2" in text for text in load("amp: {enabled: true, opt_level: O1}\n").ignored
    )
    assert load("amp: {enabled: false, opt_level: O1}\n").precision == "fp32"
    for text, message in (
        ("amp: {opt_level: O1}\n", "needs enabled"),
        ("amp: {enabled: true, opt_level: O4}\n", "should be O0, O1, O2 or O3"),
        ("amp: {enabled: true, loss_scal: 1}\n", "unknown key of amp"),
        ("amp: {enabled: true}\nprecision: bf16\n", "contradicts"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(text)


@pytest.mark.option("prescale_gradients", "gradient_predivide_factor")
def test_division_before_the_sum_reaches_deepspeed(load):
    plain = dictionary(load("zero_optimization: {stage: 2}\n"))
    keys = ("prescale_gradients", "gradient_predivide_factor")
    assert not set(keys) & plain.keys()
    before = dictionary(load("prescale_gradients: true\nzero_optimization: {stage: 2}\n"))
    part = dictionary(load("gradient_predivide_factor: 8\n"))
    assert [before[key] for key in keys] == [True, 1.0]
    assert [part[key] for key in keys] == [False, 8.0]
    assert not before["zero_optimization"]["reduce_scatter"]
    assert not part["zero_optimization"]["reduce_scatter"]
    from deepspeed.runtime.config import DeepSpeedConfig

    for asked in (before, part):
        read = DeepSpeedConfig({**asked, "train_batch_size": 4})
        assert [getattr(read, key) for key in keys] == [asked[key] for key in keys]
    for key in ("prescale_gradients: true", "gradient_predivide_factor: 2.0"):
        with pytest.raises(ConfigError, match=r"needs zero_optimization: \{reduce_scatter: false"):
            load(f"{key}\nzero_optimization: {{reduce_scatter: true}}\n")
        with pytest.raises(ConfigError, match=r"needs zero_optimization: \{reduce_scatter: false"):
            load(f"{key}\ndeepspeed_extra_args: {{zero_optimization: {{reduce_scatter: true}}}}\n")
    third = load("gradient_predivide_factor: 4\nzero_optimization: {stage: 3}\n")
    assert dictionary(third, data_size=8)["gradient_predivide_factor"] == 4
    with pytest.raises(ConfigError, match="ZeRO 3 divides once too often"):
        dictionary(third)


@pytest.mark.option("scheduler", "lr_decay_style")
def test_a_scheduler_of_deepspeed_decides_alone(load, tmp_path):
    given = (
        "scheduler: {type: warmupdecaylr, params: {total_num_steps: 50, warmup_num_steps: 10}}\n"
    )
    config = load(given + "lr_decay_style: cosine\nmin_lr: 1e-4\n")
    assert any("the block scheduler decides" in text for text in config.ignored)
    rates = [run_schedule(config).rate(step) for step in (1, 12, 32, 52)]
    assert rates == pytest.approx([0.0, 1e-3, 0.5e-3, 0.0])
    path = tmp_path / "resolved.yml"
    path.write_text(config.resolved_yaml())
    assert load_config([str(path)]) == config
    for params, message in (
        ("type: WarmupDecayLR, params: {}", "needs total_num_steps"),
        ("type: WarmupLR, params: {total_num_steps: 3}", "WarmupLR has no total_num_steps"),
        ("type: WarmupLR, params: {warmup_num_steps: 0}", "above 0"),
        ("type: WarmupLR, params: {warmup_type: cubic}", "log or linear"),
        ("type: StepLR, params: {}", "StepLR"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(f"scheduler: {{{params}}}\n")


@pytest.mark.option("fp16_lm_cross_entropy")
def test_a_loss_in_half_precision_needs_logits_in_it(load):
    asked = load("fp16_lm_cross_entropy: true\nprecision: fp16\n")
    assert asked.training.fp16_lm_cross_entropy
    for text in ("", "precision: bf16\n"):
        with pytest.raises(ConfigError, match="use precision: fp16"):
            load("fp16_lm_cross_entropy: true\n" + text)


def test_gpt_neox_cannot_do_without_deepspeed_either(load):
    assert load("deepspeed: true\n") == load()
    with pytest.raises(ConfigError, match="GPT-NeoX itself stops without DeepSpeed"):
        load("deepspeed: false\n")
    assert load("sparse_gradients: true\n").ignored
    assert load("curriculum_seqlen: 8\n").ignored


@pytest.mark.option("tensorboard", "wandb", "csv_monitor", "comms_logger")
def test_deepspeeds_monitors_are_our_sinks(load):
    board = load("tensorboard: {enabled: true, output_path: logs/, job_name: a}\n").logging
    assert (board.use_tensorboard, board.tensorboard_dir) == (True, "logs/a")
    weights = load("wandb: {enabled: true, group: g, team: t, project: p}\n").logging
    assert (weights.use_wandb, weights.wandb_group, weights.wandb_team) == (True, "g", "t")
    assert weights.wandb_project == "p"
    off = load("tensorboard: {enabled: false, output_path: x}\nwandb: {enabled: false}\n")
    assert off == load()
    none = "flops_profiler: null\ncsv_monitor: null\ncomms_logger: null\nwandb: null\n"
    assert load(none) == load()
    tables = load("csv_monitor: {enabled: true, output_path: t, job_name: j}\n").logging.csv_monitor
    assert tables is not None
    assert (tables.enabled, tables.output_path, tables.job_name) == (True, "t", "j")
    log = load("comms_logger: {enabled: true, prof_all: false, prof_ops: [all_reduce]}\n")
    assert dictionary(log)["comms_logger"]["prof_ops"] == ["all_reduce"]
    assert "comms_logger" not in dictionary(load())
    with pytest.raises(ConfigError, match="unknown key of wandb"):
        load("wandb: {enabled: true, grop: g}\n")


@pytest.mark.option("min_lr")
def test_the_rate_at_the_end_may_be_a_share_of_the_peak(load):
    assert load("decay_lr_to: 0.033\n").schedule.min_lr == 0.033e-3
    assert load("decay_lr_to: 0.1\nmin_lr: 1e-4\n").schedule.min_lr == 1e-4
    with pytest.raises(ConfigError, match="contradicts"):
        load("decay_lr_to: 0.1\nmin_lr: 2e-4\n")
    with pytest.raises(ConfigError, match="from 0 to 1"):
        load("decay_lr_to: 33\n")


@pytest.mark.option("activation_checkpointing", "checkpoint_in_cpu")
def test_where_recomputed_blocks_keep_their_inputs(load):
    block = load(
        "checkpoint_activations: true\n"
        "activation_checkpointing: {cpu_checkpointing: true, partition_activations: true}\n"
    )
    assert block.model.checkpoint_in_cpu
    assert [text.split(":")[0] for text in block.ignored] == [
        "activation_checkpointing.partition_activations"
    ]
    with pytest.raises(ConfigError, match="none is recomputed"):
        load("checkpoint_in_cpu: true\n")


@pytest.mark.option("train_epochs")
def test_epochs_stand_for_steps_until_the_data_is_counted(load):
    epochs = load("train_epochs: 2\n", without=("train_iters",))
    assert epochs.training.counts_epochs
    both = load("train_epochs: 2\n")
    assert both.training.train_iters == 100
    assert not both.training.counts_epochs
    with pytest.raises(ConfigError, match="train_iters: required"):
        load("", without=("train_iters",))


def test_what_a_checkpoint_cannot_be_saved_without(load):
    assert load("no_save_optim: true\n").checkpoint.no_save_optim
    with pytest.raises(ConfigError, match="weights are in the optimizer's files"):
        load("no_save_optim: true\nzero_optimization: {stage: 3}\n")
    with pytest.raises(ConfigError, match="needs tokenizer_type"):
        load("char_level_ppl: true\n")
