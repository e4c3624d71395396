"""Structure, names, initial weights, dropout and recomputation of the model."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.model import GPT, DomainLoss, layers, param_groups, parameter_count
from megatron.model.init import INIT_METHODS
from megatron.model.mlp import ACTIVATIONS
from megatron.parallel import Layout, Topology
from tests.support.model_spec import TestSpec

SPEC = TestSpec()


def _batch(rows: int = 2, length: int = 16) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    tokens = torch.randint(0, 97, (rows, length + 1), generator=torch.Generator().manual_seed(4))
    weight = torch.full((rows,), 1 / (rows * length))
    labels = (tokens[:, 1:], torch.ones(rows, length), torch.arange(rows), weight)
    return tokens[:, :-1], labels


def _gradients(spec: TestSpec, *, micro_batch: int = 0) -> tuple[float, list[torch.Tensor]]:
    model = GPT(spec, seed=7, loss_fn=DomainLoss(vocab_size=97))
    tokens, labels = _batch()
    model.dropout.begin(step=3, micro_batch=micro_batch)
    loss = model(tokens, labels)
    model.dropout.begin(step=3, micro_batch=micro_batch + 1)
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def test_names_are_those_of_a_pipeline_module() -> None:
    tied = {name for name, _ in GPT(SPEC, seed=0).named_parameters()}
    assert "tied_modules.embed.word_embeddings.weight" in tied
    assert {name.split(".")[0] for name in tied} == {"tied_modules", "1", "2", "3"}
    untied = GPT(dataclasses.replace(SPEC, no_weight_tying=True), seed=0).state_dict().keys()
    assert "0.word_embeddings.weight" in untied
    assert "4.final_linear.weight" in untied
    assert "1.attention.query_key_value.weight" in untied
    assert "2.mlp.dense_4h_to_h.bias" in untied


@pytest.mark.parametrize("tied", [True, False])
def test_each_layer_built_alone_is_the_same_layer(tied: bool) -> None:
    spec = dataclasses.replace(SPEC, no_weight_tying=not tied)
    model = GPT(spec, seed=11)
    described = layers(spec, Topology.single(), seed=11)
    assert len(described) == spec.num_layers + 3
    for index in reversed(range(len(described))):
        description = described[index]
        name = f"tied_modules.{description.tied_key}" if description.tied_key else str(index)
        expected = model.get_submodule(name).state_dict()
        built = description.build().state_dict()
        assert built.keys() == expected.keys()
        assert all(torch.equal(built[key], expected[key]) for key in built)


@pytest.mark.option("seed")
def test_weights_depend_on_seed_and_name_only() -> None:
    small, deep = GPT(SPEC, seed=1), GPT(dataclasses.replace(SPEC, num_layers=3), seed=1)
    first = "1.attention.query_key_value.weight"
    assert torch.equal(small.get_parameter(first), deep.get_parameter(first))
    assert not torch.equal(
        small.get_parameter(first), small.get_parameter(first.replace("1.", "2.", 1))
    )
    assert not torch.equal(small.get_parameter(first), GPT(SPEC, seed=2).get_parameter(first))


def test_building_leaves_global_randomness_alone() -> None:
    before = torch.random.get_rng_state()
    _gradients(dataclasses.replace(SPEC, hidden_dropout=0.1, attention_dropout=0.1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.option("init_method", "output_layer_init_method")
@pytest.mark.parametrize("name", INIT_METHODS)
def test_init_methods(name: str) -> None:
    spec = dataclasses.replace(
        SPEC, hidden_size=128, num_layers=4, init_method=name, output_layer_init_method=name
    )
    weight = GPT(spec, seed=0).get_parameter("1.mlp.dense_h_to_4h.weight").detach()
    rows, columns = weight.shape
    expected = {
        "normal": 0.02,
        "scaled_normal": 0.02 / math.sqrt(8),
        "single_residual_scaled_normal": 0.02 / 2,
        "orthogonal": math.sqrt(2 / rows),
        "scaled_orthogonal": math.sqrt(2 / 4 / rows),
        "xavier_uniform": math.sqrt(2 / (rows + columns)),
        "xavier_normal": math.sqrt(2 / (rows + columns)),
        "wang_init": 2 / 4 / math.sqrt(128),
        "small_init": math.sqrt(2 / (5 * 128)),
    }[name]
    assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=expected * 0.02)
    if "orthogonal" in name:
        gain = 2.0 if name == "orthogonal" else 0.5
        torch.testing.assert_close(weight.T @ weight, gain * torch.eye(columns))
    if name == "xavier_uniform":
        assert weight.abs().max() <= math.sqrt(6 / (rows + columns))


def test_default_output_projections_start_smaller() -> None:
    model = GPT(dataclasses.replace(SPEC, hidden_size=128, num_layers=8), seed=0)
    into = model.get_parameter("3.mlp.dense_4h_to_h.weight").std().item()
    assert into == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_a_later_token_never_changes_an_earlier_position() -> None:
    model = GPT(dataclasses.replace(SPEC, num_kv_heads=2), seed=0)
    tokens, _ = _batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_part_trains_and_is_counted(activation: str, norm: str) -> None:
    spec = dataclasses.replace(
        SPEC, activation=activation, norm=norm, num_kv_heads=2, no_weight_tying=True
    )
    model = GPT(spec, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(spec)
    _, gradients = _gradients(spec)
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_bias_toggles_remove_biases_and_are_counted() -> None:
    spec = dataclasses.replace(
        SPEC, use_bias_in_attn_linear=False, use_bias_in_mlp=False, norm="rmsnorm"
    )
    model = GPT(spec, seed=0)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert sum(p.numel() for p in model.parameters()) == parameter_count(spec)


def test_gelu_tanh_is_the_tanh_approximation() -> None:
    exact = GPT(SPEC, seed=0).get_submodule("1.mlp")
    fused = GPT(dataclasses.replace(SPEC, activation="gelu_tanh"), seed=0).get_submodule("1.mlp")
    x = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mlp in (exact, fused):
            mlp.dense_h_to_4h.weight.mul_(20)
        assert not torch.equal(exact(x), fused(x))
        torch.testing.assert_close(exact(x), fused(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_recomputation_changes_no_bit(together: int) -> None:
    plain = dataclasses.replace(
        SPEC, num_layers=3, hidden_dropout=0.2, attention_dropout=0.3, gpt_j_residual=True
    )
    recomputed = dataclasses.replace(
        plain, checkpoint_activations=True, checkpoint_num_layers=together
    )
    loss, gradients = _gradients(plain)
    other_loss, other_gradients = _gradients(recomputed)
    assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


@pytest.mark.option("attention_dropout", "hidden_dropout")
@pytest.mark.parametrize("key", ["attention_dropout", "hidden_dropout"])
def test_either_dropout_drops_by_itself(key: str) -> None:
    kept = _gradients(SPEC)[0]
    little, much = (_gradients(dataclasses.replace(SPEC, **{key: rate}))[0] for rate in (1e-4, 0.5))
    assert abs(little - kept) < abs(much - kept) / 10
    assert not math.isclose(much, kept, rel_tol=1e-4)


def test_dropout_is_a_function_of_its_key() -> None:
    spec = dataclasses.replace(SPEC, hidden_dropout=0.2, attention_dropout=0.2)
    assert _gradients(spec)[0] == _gradients(spec)[0]
    assert _gradients(spec)[0] != _gradients(spec, micro_batch=1)[0]
    model = GPT(spec, seed=7)
    with pytest.raises(RuntimeError, match="begin"):
        model(_batch()[0])
    model.eval()
    assert torch.equal(model(_batch()[0])[0], model(_batch()[0])[0])


def test_data_ranks_draw_different_masks_and_tensor_ranks_share_hidden_ones() -> None:
    def mask(rank: int, *, split: bool) -> torch.Tensor:
        from megatron.parallel.rng import DropoutRng

        layout = Layout(world_size=4, tensor_size=2)
        rng = DropoutRng(seed=1, topology=Topology(layout=layout, rank=rank))
        rng.begin(step=0, micro_batch=0)
        with rng.masks(torch.device("cpu"), 0, "place", split=split):
            return torch.rand(64)

    assert torch.equal(mask(0, split=False), mask(1, split=False))
    assert not torch.equal(mask(0, split=True), mask(1, split=True))
    assert not torch.equal(mask(0, split=False), mask(2, split=False))


def test_bf16_follows_fp32_and_keeps_angles_in_fp32() -> None:
    spec = dataclasses.replace(SPEC, hidden_size=64, norm="rmsnorm")
    tokens, _ = _batch(length=64)
    full = GPT(spec, seed=0)
    half = GPT(spec, seed=0).bfloat16()
    expected, found = full(tokens)[0], half(tokens)[0]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    rotary = half.get_submodule("1.attention").rotary
    assert rotary.table(64, torch.device("cpu"))[0].dtype == torch.float32


def test_rotation_is_undone_by_its_gradient() -> None:
    from megatron.model.rotary import Rotary, rotated

    angles = Rotary(dimensions=4, base=100.0).angles(5, torch.device("cpu"))
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotated(x, angles), (x,), atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(rotated(x, angles).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.option("weight_decay")
def test_norms_and_biases_do_not_decay() -> None:
    model = GPT(dataclasses.replace(SPEC, norm="rmsnorm", no_weight_tying=True), seed=0)
    decayed, spared = param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert all(names[id(p)].endswith(("bias", "scale")) for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all("norm" not in names[id(p)] for p in decayed["params"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swigul"}, "activation is 'swigul'; did you mean 'swiglu'"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"init_method": "nromal"}, "init_method is 'nromal'; did you mean 'normal'"),
        ({"output_layer_init_method": "zero"}, "output_layer_init_method is 'zero'"),
        ({"pos_emb": "alibbi"}, "pos_emb is 'alibbi'; did you mean 'alibi'"),
        ({"rotary_pct": 0.4}, "rotary_pct 0.4"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple"),
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(dataclasses.replace(SPEC, **change), seed=0)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = GPT(SPEC, seed=0)
    copied = copy.deepcopy(model)
    tokens, _ = _batch()
    before = model(tokens)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(copied(tokens)[0], before)
    assert not torch.allclose(model(tokens)[0], before)


@pytest.mark.option("num_layers", "hidden_size", "num_attention_heads")
def test_shapes_without_memory() -> None:
    huge = dataclasses.replace(
        SPEC, hidden_size=8192, num_attention_heads=64, num_layers=80, vocab_size=128_000
    )
    model = GPT(huge, seed=0, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameter_count(huge)


def test_the_configuration_group_is_a_spec() -> None:
    config = pytest.importorskip("megatron.config.model")
    group = config.ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, vocab_size=97
    )
    model = GPT(group, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(group)
    assert model(_batch()[0])[0].shape == (2, 16, 32)
