"""What the keys of experts mean, and what they are refused with."""

from __future__ import annotations

import pytest

from megatron.errors import ConfigError


def refusal(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text, without=("optimizer",) if "\noptimizer:" in text else ())
    return str(caught.value)


MIXTURE = "moe_num_experts: 8\nmoe_router_type: topk\n"


def test_older_names_are_the_same_keys(load):
    config = load("num_experts: 4\nexpert_interval: 2\nmoe_aux_loss_coeff: 0.5\n").model
    assert (config.moe_num_experts, config.moe_expert_interval) == (4, 2)
    assert config.moe_loss_coeff == 0.5


def test_the_factor_of_the_balancing_loss_follows_the_router(load):
    assert load(MIXTURE).model.moe_loss_coeff == 0.01
    assert load("moe_num_experts: 8\n").model.moe_loss_coeff == 0.0
    assert load(MIXTURE + "moe_loss_coeff: 0\n").model.moe_loss_coeff == 0.0
    assert load("moe_num_experts: 0\n").model.moe_loss_coeff is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("moe_top_k: 9", ("moe_top_k", "at most")),
        ("moe_normalize_expert_weights: true", ("moe_normalize_expert_weights", "moe_top_k: 2")),
        ("use_mup: true\nmup_base_hidden_size: 8", ("moe_num_experts", "use_mup")),
        ("attention_config: [[[gmlp], all]]", ("moe_num_experts", "gmlp")),
        ("moe_token_dropping: true", ("moe_token_dropping", "use false")),
        ("moe_type: deepspeed", ("moe_type", "remove")),
        ("moe_use_residual: true", ("moe_use_residual", "moe_expert_interval")),
        ("moe_glu: true", ("moe_glu", "activation")),
        ("moe_router_type: expert_choice", ("moe_router_type", "sinkhorn")),
    ],
)
def test_what_cannot_be_is_refused_by_name(load, text, parts):
    keys = {line.partition(":")[0] for line in text.splitlines()}
    base = "".join(
        f"{line}\n" for line in MIXTURE.splitlines() if line.partition(":")[0] not in keys
    )
    said = refusal(load, base + text + "\n")
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("zero_optimization: {stage: 3}", "stage: 2"),
        ("zero_optimization: {stage: 2, contiguous_gradients: false}", "contiguous_gradients"),
        ("zero_optimization: {stage: 1, reduce_scatter: false}", "reduce_scatter"),
        ("zero_optimization: {stage: 1, offload_optimizer: {device: cpu}}", "offload_optimizer"),
        ("deepspeed_extra_args: {zero_optimization: {stage: 0}}", "use stage 1"),
        ("optimizer: {type: SM3, params: {lr: 0.1}}", "SM3"),
        ("log_gradient_noise_scale: true", "noise scale"),
        ("soft_prompt_tuning: {enabled: true}", "soft_prompt_tuning"),
        ("moe_num_experts: 3", "does not divide moe_num_experts (3)"),
        ("moe_num_experts: 1", "set moe_num_experts"),
    ],
)
def test_what_shared_experts_do_not_go_with(load, text, part):
    key = text.partition(":")[0]
    base = "".join(f"{line}\n" for line in MIXTURE.splitlines() if not line.startswith(key))
    said = refusal(load, base + f"moe_expert_parallel_size: 2\n{text}\n")
    assert "moe_expert_parallel_size" in said
    assert part in said


def test_they_go_with_the_rest(load):
    config = load(MIXTURE + "moe_expert_parallel_size: 4\nzero_optimization: {stage: 2}\n")
    assert config.parallel.moe_expert_parallel_size == 4
