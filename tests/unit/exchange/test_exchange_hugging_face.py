"""Ours to Hugging Face and back: logits as transformers', the same bits after both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchange
from support.exchange import LLAMA, NEOX, VOCABULARY

from megatron.errors import CheckpointError, ConfigError
from megatron.exchange.architecture import choose_architecture
from megatron.exchange.export import ExportOptions, export
from megatron.exchange.hf_import import import_hugging_face
from megatron.exchange.logits import Rounded, our_logits, sample_tokens
from megatron.exchange.source import find_source
from megatron.exchange.weights import open_weights
from megatron.model.gpt import GPT

transformers = pytest.importorskip("transformers")

MISTRAL = {**LLAMA, "sliding_window_width": 8}
MIXTRAL = {
    **LLAMA,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_normalize_expert_weights": True,
    "moe_loss_coeff": 0.02,
}
# Keys, layout, and the class that is expected.
GRID: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (NEOX, {}, "GPTNeoX"),
    ({**NEOX, "no_weight_tying": True, "rotary_pct": 0.25}, {"tensor": 2}, "GPTNeoX"),
    ({**NEOX, "gpt_j_residual": True, "activation": "gelu_tanh"}, {"pipeline": True}, "GPTNeoX"),
    (
        {**NEOX, "gpt_j_residual": True, "no_weight_tying": True, "activation": "relu"},
        {"tensor": 2, "pipeline": True},
        "GPTNeoX",
    ),
    ({**NEOX, "use_bias_in_attn_linear": False, "activation": "silu"}, {"tensor": 2}, "GPTNeoX"),
    ({**NEOX, "use_bias_in_mlp": False, "intermediate_size": None}, {}, "GPTNeoX"),
    ({**NEOX, "num_kv_heads": 2, "activation": "mish"}, {"tensor": 2}, "GPTNeoX"),
    ({**NEOX, "pos_emb": "none", "layernorm_epsilon": 1e-3}, {}, "GPTNeoX"),
    ({**NEOX, "rotary_emb_base": 500.0, "use_bias_in_norms": False}, {}, "GPTNeoX"),
    (LLAMA, {"tensor": 2}, "Llama"),
    ({**LLAMA, "no_weight_tying": False, "num_kv_heads": 4}, {"pipeline": True}, "Llama"),
    ({**LLAMA, "use_bias_in_attn_linear": True, "num_kv_heads": 1}, {}, "Llama"),
    ({**LLAMA, "use_bias_in_mlp": True}, {"tensor": 2, "pipeline": True}, "Llama"),
    ({**LLAMA, "activation": "geglu"}, {}, "Llama"),
    (MISTRAL, {"tensor": 2}, "Mistral"),
    (MIXTRAL, {"tensor": 2}, "Mixtral"),
    ({**MIXTRAL, "sliding_window_width": 8, "moe_top_k": 3}, {"pipeline": True}, "Mixtral"),
]


def quiet(text: str) -> None:
    """Take a line for the console."""


def given(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(("keys", "layout"), [(NEOX, {"pipeline": True}), (LLAMA, {"tensor": 2})])
def test_updates_are_added_to_the_weights(
    tmp_path: Path, keys: dict[str, Any], layout: dict[str, Any]
) -> None:
    every = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    keys = {**given(keys), "lora": {"rank": 3, "targets": every}}
    model = exchange.config(tmp_path / "run", keys).model
    weights = exchange.random_weights(model)
    exchange.save(tmp_path / "run", keys, weights, **layout)
    said: list[str] = []
    source = find_source(tmp_path / "run", step=None, say=quiet)
    export(source, tmp_path / "hf", ExportOptions(), say=said.append)
    assert any("updates of rank 3" in line for line in said)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = theirs(tokens).logits
        hidden, output = loaded(model, weights)(tokens)
        bare, _ = loaded(model.model_copy(update={"lora": None}), weights)(tokens)
    expected = (hidden @ output.T)[..., :VOCABULARY]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (bare - hidden).abs().max() > 0.01


@pytest.mark.parametrize(("keys", "layout", "kind"), GRID)
def test_there_and_back(
    tmp_path: Path, keys: dict[str, Any], layout: dict[str, Any], kind: str
) -> None:
    run, settings = tmp_path / "run", exchange.config(tmp_path / "run", given(keys))
    model, weights = settings.model, exchange.random_weights(settings.model)
    exchange.save(run, given(keys), weights, **layout)
    folder = tmp_path / "hf"
    export(find_source(run, step=None, say=quiet), folder, ExportOptions(), say=quiet)

    # By transformers alone, as a user would; ours by the whole model in one module.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = theirs(tokens).logits
        hidden, output = loaded(model, weights)(tokens)
    expected = (hidden @ output.T)[..., :VOCABULARY]
    assert found.shape == expected.shape == (2, 24, VOCABULARY)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 0.1

    back = tmp_path / "back"
    import_hugging_face(folder, back, say=quiet)
    again = find_source(back, step=7, say=quiet)
    assert again.model == model.model_copy(update={"make_vocab_size_divisible_by": 8})
    with open_weights(
        again.path, again.manifest, model, exact=False, scratch=tmp_path, say=quiet
    ) as held:
        for name, value in weights.tensors.items():
            assert torch.equal(held.read(name), value), name
    # The folder alone says as much, but for what transformers has no word for.
    (folder / "neomix.json").unlink()
    import_hugging_face(folder, tmp_path / "alone", say=quiet)
    alone = find_source(tmp_path / "alone", step=None, say=quiet).model
    filled = (
        {"use_bias_in_mlp", "num_kv_heads", "use_bias_in_norms"} if kind == "GPTNeoX" else set()
    )
    ours = {"make_vocab_size_divisible_by", "seq_length", *filled}
    assert alone.model_dump(exclude=ours) == model.model_dump(exclude=ours)


def loaded(model: Any, weights: exchange.Held) -> GPT:
    """Return the whole model with these weights, padded as its parameters are."""
    whole = GPT(model, seed=0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.zero_()
            value = weights.read(name)
            parameter[tuple(slice(size) for size in value.shape)].copy_(value)
    return whole.eval()


def test_greedy_continuations_are_the_same(tmp_path: Path) -> None:
    for number, keys in enumerate((NEOX, LLAMA)):
        run = tmp_path / f"run{number}"
        model = exchange.config(run, keys).model
        weights = exchange.random_weights(model, seed=3)
        exchange.save(run, keys, weights, tensor=2)
        folder = tmp_path / f"hf{number}"
        export(find_source(run, step=None, say=quiet), folder, ExportOptions(), say=quiet)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.tensor([[5, 41, 7]])
        made = theirs.generate(tokens, max_new_tokens=12, do_sample=False)
        for _ in range(12):
            logits = our_logits(model, weights, tokens)[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        assert made.tolist() == tokens.tolist()
        assert len(set(made[0].tolist())) > 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_and_shards(tmp_path: Path, precision: str) -> None:
    run = tmp_path / "run"
    model = exchange.config(run, LLAMA).model
    weights = exchange.random_weights(model)
    exchange.save(run, LLAMA, weights, pipeline=True)
    said: list[str] = []
    options = ExportOptions(precision=precision, max_shard_size=9000)
    export(find_source(run, step=None, say=quiet), tmp_path / "hf", options, say=said.append)
    assert f"rounding the weights to {precision} moves them by" in said[-1]
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 9000 + 4000 for file in files)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(
        value.numel() for value in weights.tensors.values()
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert theirs.dtype == dtype
    tokens = sample_tokens(model)
    with torch.no_grad():
        found = theirs.float()(tokens).logits
    expected = our_logits(model, Rounded(weights, dtype), tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The precision goes along: there, and back to the same files.
    import_hugging_face(tmp_path / "hf", tmp_path / "back", say=quiet)
    again = find_source(tmp_path / "back", step=None, say=quiet)
    export(again, tmp_path / "hf2", ExportOptions(max_shard_size=9000), say=quiet)
    for file in files:
        assert (tmp_path / "hf2" / file.name).read_bytes() == file.read_bytes()


REFUSED = [
    ({**NEOX, "gpt_j_residual": True, "gpt_j_tied": True}, "auto", "gpt_j_tied: true"),
    ({**NEOX, "pos_emb": "learned"}, "auto", "pos_emb: learned"),
    ({**NEOX, "pos_emb": "alibi"}, "auto", "pos_emb: alibi"),
    ({**NEOX, "activation": "geglu"}, "auto", "activation: geglu"),
    ({**NEOX, "activation": "softsign"}, "auto", "activation: softsign"),
    ({**NEOX, "norm": "scalenorm"}, "auto", "norm: scalenorm"),
    ({**LLAMA, "rms_norm_epsilon_outside_root": True}, "auto", "rms_norm_epsilon_outside_root"),
    ({**NEOX, "use_mup": True, "mup_base_hidden_size": 16}, "auto", "use_mup: true"),
    ({**LLAMA, "use_qk_layernorm": True}, "auto", "use_qk_layernorm: true"),
    ({**NEOX, "sliding_window_width": 4}, "auto", "sliding_window_width: 4"),
    ({**LLAMA, "rotary_pct": 0.5}, "auto", "rotary_pct: 0.5"),
    ({**LLAMA, "gpt_j_residual": True}, "llama", "gpt_j_residual: true"),
    ({**LLAMA, "use_bias_in_mlp": True}, "mistral", "use_bias_in_mlp: true"),
    (LLAMA, "neox", "norm: rmsnorm"),
    (LLAMA, "mixtral", "moe_num_experts: 1"),
    (MIXTRAL, "llama", "moe_num_experts: 4"),
    ({**NEOX, "moe_num_experts": 4}, "auto", "moe_num_experts: 4"),
    ({**MIXTRAL, "moe_expert_interval": 2}, "auto", "moe_expert_interval: 2"),
    ({**MIXTRAL, "moe_router_type": "sinkhorn"}, "auto", "moe_router_type: sinkhorn"),
    (
        {**MIXTRAL, "moe_normalize_expert_weights": False},
        "auto",
        "moe_normalize_expert_weights: false",
    ),
    (
        {**MIXTRAL, "moe_normalize_expert_weights": False, "moe_top_k": 1},
        "mixtral",
        "moe_top_k: 1",
    ),
    (NEOX, "llama", "norm: layernorm"),
]


@pytest.mark.parametrize(("keys", "architecture", "named"), REFUSED)
def test_what_transformers_has_no_model_for(
    tmp_path: Path, keys: dict[str, Any], architecture: str, named: str
) -> None:
    model = exchange.config(tmp_path, keys).model
    with pytest.raises(ConfigError) as raised:
        choose_architecture(model, architecture)
    assert named in str(raised.value)


def test_a_mismatch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    model = exchange.config(run, NEOX).model
    exchange.save(run, NEOX, exchange.random_weights(model))
    source = find_source(run, step=None, say=quiet)
    # Another rotary base than the model's is what such a defect looks like.
    from megatron.exchange import export as module

    right = module.hf_config

    def wrong(model: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        found = right(model, *arguments, **options)
        return {**found, "rope_parameters": {**found["rope_parameters"], "rope_theta": 100.0}}

    monkeypatch.setattr(module, "hf_config", wrong)
    with pytest.raises(CheckpointError, match="logits differ by"):
        export(source, tmp_path / "hf", ExportOptions(), say=quiet)
    monkeypatch.undo()
    export(source, tmp_path / "hf", ExportOptions(), say=quiet)
    # On the way back as well: a folder whose settings are not its weights'.
    content = json.loads((tmp_path / "hf/config.json").read_text())
    content["hidden_act"] = "relu"
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(content))
    import_hugging_face(tmp_path / "other", tmp_path / "fine", say=quiet)
    from megatron.exchange import hf_import

    monkeypatch.setattr(hf_import, "their_logits", lambda *_: torch.zeros(3, 24, VOCABULARY))
    with pytest.raises(CheckpointError, match="logits differ by"):
        import_hugging_face(tmp_path / "hf", tmp_path / "back", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "hf", "other", "run"]


def test_transformers_own_folders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.GPTNeoXConfig(**sizes, rotary_pct=0.25, hidden_act="gelu_new")
    )
    made.save_pretrained(tmp_path / "safe", max_shard_size="8KB")
    assert len(list((tmp_path / "safe").glob("*.safetensors"))) > 1
    import_hugging_face(tmp_path / "safe", tmp_path / "ours", step=11, say=quiet)
    source = find_source(tmp_path / "ours", step=11, say=quiet)
    assert (source.model.activation, source.model.rotary_pct) == ("gelu_tanh", 0.25)
    assert (source.model.no_weight_tying, source.model.gpt_j_residual) == (True, True)

    # The same in files of torch.save, as older folders have them; a hostile one is not opened.
    old = tmp_path / "old"
    old.mkdir()
    shutil.copyfile(tmp_path / "safe/config.json", old / "config.json")
    state = {name.replace("lm_head", "embed_out"): one for name, one in made.state_dict().items()}
    torch.save(state, old / "pytorch_model.bin")
    import_hugging_face(old, tmp_path / "from_old", say=quiet)
    for file in sorted((tmp_path / "ours/global_step11/zero").rglob("fp32.pt")):
        other = tmp_path / "from_old/global_step0/zero" / file.parent.name / "fp32.pt"
        assert torch.equal(torch.load(file)["param"], torch.load(other)["param"])
    torch.save({**state, "extra": Hostile()}, old / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="unpickling it would run"):
        import_hugging_face(old, tmp_path / "hostile", say=quiet)
    torch.save({**state, "extra.weight": torch.ones(2)}, old / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"unknown: extra\.weight"):
        import_hugging_face(old, tmp_path / "unknown", say=quiet)
    assert not (tmp_path / "unknown").exists()


def test_transformers_own_mixtral(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            max_position_embeddings=24,
            initializer_range=0.3,
            num_local_experts=4,
            router_jitter_noise=0.1,
        )
    )
    made.save_pretrained(tmp_path / "hf")
    import_hugging_face(tmp_path / "hf", tmp_path / "ours", step=3, say=quiet)
    model = find_source(tmp_path / "ours", step=3, say=quiet).model
    assert (model.moe_num_experts, model.moe_top_k, model.moe_jitter_eps) == (4, 2, 0.1)
    assert model.moe_loss_coeff == made.config.router_aux_loss_coef


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_scaling is 'linear'",
        ),
        ({"hidden_size": 30}, "not divisible"),
        ({"vocab_size": 90}, "does not make up"),
    ],
)
def test_foreign_models_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run = tmp_path / "run"
    exchange.save(run, NEOX, exchange.random_weights(exchange.config(run, NEOX).model))
    export(find_source(run, step=None, say=quiet), tmp_path / "hf", ExportOptions(), say=quiet)
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError) as raised:
        import_hugging_face(tmp_path / "hf", tmp_path / "back", say=quiet)
    assert named in str(raised.value)
    assert not (tmp_path / "back").exists()
