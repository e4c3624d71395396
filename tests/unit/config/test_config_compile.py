"""Where blocks cannot be compiled, and that it is said by name."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError

ON = "torch_compile: true\n"
CURRICULUM = (
    "curriculum_learning: {enabled: true, min_difficulty: 16, max_difficulty: 128, "
    "schedule_type: fixed_linear, "
    "schedule_config: {total_curriculum_step: 40, difficulty_step: 8}}\n"
)
LORA = "lora: {enabled: true, rank: 4, alpha: 8}\n"


def test_it_is_off_unless_asked_for(load):
    assert not load().training.torch_compile
    assert load(ON).training.torch_compile


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("moe_num_experts: 4\n", ("moe_num_experts", "known only when they are there")),
        ("zero_optimization: {stage: 3}\n", ("ZeRO 3", "use stage 2")),
        (CURRICULUM, ("curriculum_learning", "every length")),
        ("flops_profiler: {enabled: true}\n", ("flops_profiler", "without it")),
    ],
)
def test_what_cannot_be_compiled_is_refused(load, text, parts):
    load(text)
    with pytest.raises(ConfigError) as caught:
        load(ON + text)
    for part in ("torch_compile", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "zero_optimization: {stage: 2}\n",
        "pipe_parallel_size: 2\nnum_gpus: 2\n",
        "model_parallel_size: 2\nsequence_parallel: true\nnum_gpus: 2\n",
        "checkpoint_activations: true\ncheckpoint_in_cpu: true\nhidden_dropout: 0.1\n",
        "bf16: {enabled: true}\n",
        "attention_config: [[[global, sparse_fixed], all]]\n",
        CURRICULUM.replace("true", "false"),
        "flops_profiler: {enabled: false}\n",
    ],
)
def test_what_can_is_not(load, text):
    assert load(ON + text).training.torch_compile
