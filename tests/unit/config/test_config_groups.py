from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from megatron.config import (
    BatchConfig,
    CheckpointConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
    ZeroConfig,
    deepspeed_config,
    resolve_batch,
)
from megatron.errors import ConfigError


def model(**options):
    return ModelConfig(
        **{"num_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "seq_length": 8} | options
    )


@pytest.mark.option("expansion_factor", "mlp_multiple_of")
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 384),
        ({"activation": "swiglu"}, 256),
        ({"activation": "swiglu", "hidden_size": 4096}, 11008),
        ({"activation": "swiglu", "mlp_multiple_of": 8}, 256),
        ({"activation": "geglu", "mlp_multiple_of": 7}, 259),
        ({"expansion_factor": 3.5}, 336),
        ({"expansion_factor": 1e-3}, 1),
        ({"intermediate_size": 100}, 100),
        ({"intermediate_size": 100, "mlp_multiple_of": 64}, 128),
        ({"intermediate_size": 336, "expansion_factor": 3.5}, 336),
    ],
)
def test_mlp_width(options, width):
    config = model(**options)
    assert config.intermediate_size == width
    assert ModelConfig.model_validate(config.model_dump()).intermediate_size == width


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu", "expansion_factor": 4},
        {"activation": "swiglu", "intermediate_size": 97 * 6},
        {"expansion_factor": math.inf},
        {"expansion_factor": 0},
        {"rotary_pct": 0.0},
        {"hidden_dropout": 1.0},
        {"num_attention_heads": 5},
        {"num_layers": True},
        {"num_layers": 2.5},
        {"seq_length": None},
    ],
)
def test_bad_models(options):
    with pytest.raises(ValidationError):
        model(**options)


def test_model_without_positions_needs_no_rotation():
    assert model(pos_emb="none", rotary_pct=0.0).pos_emb == "none"


@pytest.mark.option("make_vocab_size_divisible_by")
def test_padded_vocabulary():
    assert model(vocab_size=50257).padded_vocab_size(1) == 50304
    assert model(vocab_size=50257).padded_vocab_size(2) == 50432
    assert model(vocab_size=1, make_vocab_size_divisible_by=1).padded_vocab_size(1) == 1
    with pytest.raises(ValueError, match="vocab_size"):
        model().padded_vocab_size(1)


@pytest.mark.option(
    "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"
)
@pytest.mark.parametrize(
    ("given", "ranks", "resolved"),
    [
        ((None, 4, None), 2, (4, 1, 8)),
        ((None, 4, 3), 2, (4, 3, 24)),
        ((16, 4, None), 2, (4, 2, 16)),
        ((16, None, 2), 2, (4, 2, 16)),
        ((16, None, None), 4, (4, 1, 16)),
        ((16, 4, 2), 2, (4, 2, 16)),
    ],
)
def test_batch_arithmetic(given, ranks, resolved):
    total, micro, accumulation = given
    batch = BatchConfig(
        train_batch_size=total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
    )
    assert resolve_batch(batch, ranks) == resolved


@pytest.mark.parametrize(
    ("given", "ranks", "said"),
    [
        ((None, None, None), 1, "no batch size"),
        ((None, None, 2), 1, "no batch size"),
        ((10, 4, None), 1, "nearest that fit: 8 and 12"),
        ((2, 4, None), 1, "the least that fits is 4"),
        ((10, None, 3), 2, "nearest that fit: 6 and 12"),
        ((16, 4, 2), 4, r"= 32; leave one"),
    ],
)
def test_batch_sizes_that_do_not_fit(given, ranks, said):
    total, micro, accumulation = given
    batch = BatchConfig(
        train_batch_size=total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
    )
    with pytest.raises(ConfigError, match=said):
        resolve_batch(batch, ranks)


def saved(config, last):
    return [step for step in range(last + 1) if config.saves_at(step, last)]


@pytest.mark.option("checkpoint_factor", "checkpoint_scale", "extra_save_iters")
def test_steps_to_save_at():
    assert saved(CheckpointConfig(), 10) == [10]
    assert saved(CheckpointConfig(save_interval=4), 10) == [4, 8, 10]
    extra = CheckpointConfig(save_interval=4, extra_save_iters=[0, 3])
    assert saved(extra, 10) == [0, 3, 4, 8, 10]
    log = CheckpointConfig(checkpoint_scale="log", checkpoint_factor=2)
    assert saved(log, 20) == [1, 2, 4, 8, 16, 20]
    thin = CheckpointConfig(checkpoint_scale="log", checkpoint_factor=1.5)
    assert saved(thin, 12) == [1, 2, 3, 5, 8, 11, 12]


def test_schedule_lengths():
    assert ScheduleConfig().decay_steps(100) == 100
    assert ScheduleConfig(lr_decay_fraction=0.29).decay_steps(100) == 28  # floor, as GPT-NeoX
    assert ScheduleConfig(lr_decay_fraction=0.5, lr_decay_iters=70).decay_steps(100) == 70
    assert ScheduleConfig(warmup=0.015).warmup_steps(100) == 1.5


def test_validation_sizes():
    training = TrainingConfig(train_iters=1, eval_iters=10, max_test_samples_per_dataset=7)
    assert training.validation_samples(16) == 160
    assert training.validation_samples(16, "test") == 7
    assert TrainingConfig(train_iters=1, on_nonfinite="stop").nonfinite_limit == 0
    assert TrainingConfig(train_iters=1, on_nonfinite="SKIP( 12)").nonfinite_limit == 12
    for text in ("skip(0)", "skip(-1)", "skip", "go", "skip(1.5)"):
        with pytest.raises(ValidationError):
            TrainingConfig(train_iters=1, on_nonfinite=text)


def test_bounds_of_layout():
    for make in (
        lambda: ParallelConfig(pipe_parallel_size=-1),
        lambda: ParallelConfig(model_parallel_size=0),
        lambda: ZeroConfig(stage=4),
        lambda: ZeroConfig(stage=-1),
        lambda: LaunchConfig(master_port=65536),
        lambda: LaunchConfig(num_gpus=0),
    ):
        with pytest.raises(ValidationError):
            make()
    assert [ZeroConfig(stage=stage).effective_stage for stage in range(4)] == [1, 1, 2, 3]


@pytest.mark.option("gradient_clipping", "zero_optimization")
def test_deepspeed_dictionary(load):
    config = load("gradient_clipping: 0.5\n")
    assert deepspeed_config(config, 4, 2, 3) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": math.inf,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }


@pytest.mark.option("communication_data_type", "deepspeed_extra_args")
def test_deepspeed_dictionary_with_everything(load):
    config = load(
        "zero_optimization: {stage: 2, overlap_comm: true}\n"
        "fp16: {enabled: true, initial_scale_power: 8}\nfp32_allreduce: true\n"
        "deepspeed_extra_args: {zero_optimization: {overlap_comm: false}, dump_state: true}\n"
    )
    result = deepspeed_config(config, 1, 1, 1)
    assert result["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert result["fp16"]["enabled"] is True
    assert result["fp16"]["initial_scale_power"] == 8
    assert result["communication_data_type"] == "fp32"
    assert result["dump_state"] is True
    assert deepspeed_config(load("precision: bf16\n"), 1, 1, 1)["bf16"] == {"enabled": True}
    assert config.zero.options == {"overlap_comm": True}  # merging changes nothing


def test_a_narrow_gated_width_can_be_read_again():
    """What a run writes down of itself is its configuration; GPT-NeoX's thrice the width is not."""
    sizes = {"num_layers": 1, "seq_length": 8, "num_attention_heads": 2, "activation": "swiglu"}
    narrow = ModelConfig(hidden_size=32, **sizes)
    assert narrow.intermediate_size == 256
    assert ModelConfig(**narrow.model_dump()) == narrow
    with pytest.raises(ValidationError, match="did you mean 2048"):
        ModelConfig(hidden_size=512, intermediate_size=6144, **sizes)
