from __future__ import annotations

import json

import pytest

from megatron.config import load_config
from megatron.config.canonical import FIELDS, accepted_keys, known_keys
from megatron.config.neox import REFUSED, WITHOUT_EFFECT
from megatron.config.parity import upstream_keys
from megatron.errors import ConfigError

# By system, every key with its default there.
KEYS = {
    system: {key: default for key, (_, _, default) in keys.items()}
    for system, keys in upstream_keys().items()
}

# Defaults that need another key beside them, or that the base configuration contradicts.
NEEDS_MORE = {"tokenizer_type", "optimizer_type"}


def test_lists_are_whole():
    assert len(KEYS["gpt-neox"]) == 318
    assert len(KEYS["online-data-mixing"]) == 208


@pytest.mark.parametrize("system", KEYS)
def test_every_key_is_classified_once(system):
    kinds = {key: [] for key in KEYS[system]}
    for name, keys in (
        ("accepted", accepted_keys()),
        ("refused", REFUSED),
        ("without effect", WITHOUT_EFFECT),
    ):
        for key in keys:
            if key in kinds:
                kinds[key].append(name)
    assert {key: found for key, found in kinds.items() if len(found) != 1} == {}


def test_no_name_is_known_twice():
    keys = known_keys()
    assert len(keys) == len(set(keys))


def test_their_defaults_are_never_an_error(load):
    pairs = {
        f"{key}: {json.dumps(value)}\n"
        for keys in KEYS.values()
        for key, value in keys.items()
        if value is not None and key not in NEEDS_MORE
    }
    assert len(pairs) > 190
    for text in sorted(pairs):
        load(text)


def test_their_other_defaults(load):
    assert load().model.pos_emb == "rotary"
    assert load("pos_emb: learned\n").model.pos_emb == "learned"
    assert load("optimizer_type: adam\n", "optimizer.type=null").optimizer.type == "adamw"
    config = load("tokenizer_type: GPT2BPETokenizer\nvocab_file: v\nmerge_file: m\n")
    assert config.tokenizer.tokenizer_type == "GPT2BPETokenizer"


def test_refusals_name_key_and_alternative(load):
    values = {"deepspeed": "false"}
    text = "".join(
        f"{key.replace('_', '-')}: {values.get(key, '{enabled: true, x: 7}')}\n" for key in REFUSED
    )
    for start in range(0, len(REFUSED), 25):  # no message lists more than 30 problems
        keys = list(REFUSED)[start : start + 25]
        lines = "".join(text.splitlines(keepends=True)[start : start + 25])
        with pytest.raises(ConfigError) as error:
            load(lines)
        for number, key in enumerate(keys, start=11):
            assert f"a.yml:{number}: {key.replace('_', '-')}: " in str(error.value)
            assert f"refused: {REFUSED[key].instead}" in str(error.value)


@pytest.mark.parametrize("value", ["false", "null", "{}", "[]", "{enabled: false}", '""'])
def test_refused_keys_may_be_switched_off(load, value):
    assert load("".join(f"{key}: {value}\n" for key in REFUSED if key != "deepspeed")) == load()
    assert load("deepspeed: true\n") == load()


def test_keys_without_effect_are_listed(load):
    config = load("".join(f"{key}: 3\n" for key in WITHOUT_EFFECT))
    assert config.ignored == tuple(f"{key}: {why}" for key, why in WITHOUT_EFFECT.items())
    assert load("".join(f"{key}: null\n" for key in WITHOUT_EFFECT)).ignored == ()


PYTHIA = """\
{
  "pipe-parallel-size": 1,
  "model-parallel-size": 1,
  "num-layers": 12,
  "hidden-size": 768,
  "num-attention-heads": 12,
  "seq-length": 2048,
  "max-position-embeddings": 2048,
  "pos-emb": "rotary",
  "rotary-pct": 0.25,
  "no-weight-tying": true,
  "gpt-j-residual": true,
  "output-layer-parallelism": "column",
  "attention-config": [[["flash"], 12]],
  "scaled-upper-triang-masked-softmax-fusion": true,
  "bias-gelu-fusion": true,
  "init_method": "small_init",
  "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
  "min_lr": 0.00006,
  "zero_optimization": {
    "stage": 1,
    "allgather_partitions": True,
    "allgather_bucket_size": 500000000,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500000000,
    "contiguous_gradients": True,
    "cpu_offload": False
  },
  "train_micro_batch_size_per_gpu": 32,
  "data-impl": "mmap",
  "num_workers": 1,
  "checkpoint-activations": true,
  "partition-activations": true,
  "synchronize-each-layer": true,
  "gradient_clipping": 1.0,
  "weight-decay": 0.1,
  "hidden-dropout": 0,
  "attention-dropout": 0,
  "fp16": {
    "fp16": true, "enabled": true, "loss_scale": 0, "loss_scale_window": 1000,
    "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1
  },
  "train-iters": 143000,
  "lr-decay-iters": 143000,
  "distributed-backend": "nccl",
  "lr-decay-style": "cosine",
  "warmup": 0.01,
  "checkpoint-factor": 1000,
  "extra-save-iters": [0, 1, 2, 4, 8],
  "eval-interval": 40000,
  "eval-iters": 10,
  "log-interval": 10,
  "steps_per_print": 10,
  "wall_clock_breakdown": true,
  "tokenizer-type": "HFTokenizer",
}
"""


def test_a_whole_file_of_theirs(files):
    paths = """\
data-path: "data/pile/pile_text_document"
vocab-file: tokenizer.json
save: checkpoints
load: checkpoints
tensorboard-dir: tensorboard
log-dir: logs
use_wandb: null
"""
    config = files.load(PYTHIA, paths)
    assert config.model.activation == "gelu_tanh"
    assert config.precision == "fp16"
    assert config.fp16.initial_scale_power == 12
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.type == "adamw"
    assert config.checkpoint.save_interval == 1000
    assert config.checkpoint.save_dir == "checkpoints"
    assert config.zero.options["overlap_comm"] is True
    assert config.domains["pile"].train == ("data/pile/pile_text_document",)
    assert [line.split(":")[0] for line in config.ignored] == [
        "output-layer-parallelism",
        "attention-config",
        "scaled-upper-triang-masked-softmax-fusion",
        "num_workers",
        "partition-activations",
        "synchronize-each-layer",
        "distributed-backend",
    ]
    assert config.logging.steps_per_print == 10
    assert config.logging.wall_clock_breakdown


@pytest.mark.option("optimizer", "optimizer_type")
def test_optimizer_forms(load):
    drop = "optimizer=null"
    flat = load("optimizer_type: Adam\nlr: 1e-3\nweight_decay: 0.2\nclip-grad: 3\n", drop)
    block = load("", drop, "optimizer={type: Adam, params: {lr: 1e-3, weight_decay: 0.2, "
                 "max_grad_norm: 3}}")  # fmt: skip
    assert flat.optimizer == block.optimizer
    assert flat.optimizer.gradient_clipping == 3
    coupled = load("", "optimizer.params.adam_w_mode=false", "optimizer.type=Adam")
    assert coupled.optimizer.type == "adam"
    with pytest.raises(ConfigError, match="contradicts type: AdamW"):
        load("", "optimizer.params.adam_w_mode=false")
    assert load("", "optimizer.type=adam").optimizer.type == "adamw"
    for text in ("amsgrad=true", "bias_correction=false", "momentum=0.9"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            load("", f"optimizer.params.{text}")
    for name in ("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Muon", "MuAdam", "MuSGD"):
        with pytest.raises(ConfigError, match=f"refused: {name} .*; use "):
            load("", f"optimizer.type={name}")


@pytest.mark.option("optimizer", "optimizer_type", "use_bnb_optimizer")
def test_every_kind_of_optimizer_has_its_own_defaults(load):
    drop = "optimizer=null"

    def given(text):
        return load("", drop, f"optimizer={text}").optimizer

    sm3 = given("{type: SM3}")
    assert (sm3.type, sm3.lr, sm3.weight_decay) == ("sm3", 0.1, 0.0)
    assert sm3.params == {"momentum": 0.0, "beta": 0.0, "eps": 1e-30}
    madgrad = given("{type: madgrad_wd, params: {weight_decay: 0.3}}")
    assert (madgrad.lr, madgrad.weight_decay) == (0.01, 0.3)
    assert madgrad.params == {"momentum": 0.9, "eps": 1e-6}
    assert given("{type: Lion, params: {lr: 1e-4}}").params == {"betas": (0.9, 0.99)}
    assert given("{type: SGD, params: {lr: 1, momentum: 0.5}}").state == ("momentum_buffer",)
    assert given("{type: SGD, params: {lr: 1}}").state == ()
    host = load("", drop, "optimizer={type: CPU_Adam, params: {lr: 1}}")
    assert host.optimizer.type == "adamw"
    assert "offload_optimizer" in host.ignored[0]
    assert given("{type: CPU_torch_Adam, params: {lr: 1}}").type == "adam"
    assert load("use_bnb_optimizer: true\n").optimizer.type == "adam8bit"
    for kind, wrong in (
        ("Lion", "eps: 1e-8"),
        ("SM3", "betas: [0.9, 0.9]"),
        ("Adam", "beta: 0.5"),
        ("SGD", "eps: 1e-8"),
    ):
        with pytest.raises(ConfigError, match="has no such parameter; it has lr, weight_decay"):
            given(f"{{type: {kind}, params: {{lr: 1, {wrong}}}}}")
    with pytest.raises(ConfigError, match="belongs to Adam, and the optimizer is lion"):
        load("use_bnb_optimizer: true\n", "optimizer.type=Lion")
    for zero in ("{stage: 3}", "{stage: 1, cpu_offload: true}"):
        with pytest.raises(ConfigError, match="SM3 keeps sums over whole rows and columns"):
            load("", drop, "optimizer={type: SM3}", f"zero_optimization={zero}")


@pytest.mark.parametrize("kind", ["SM3", "madgrad_wd", "Lion", "SGD", "Adam8bit", "CPU_torch_Adam"])
def test_a_resolved_optimizer_loads_to_itself(load, tmp_path, kind):
    text = f"{{type: {kind}, params: {{lr: 0.5}}}}"
    config = load("decay_embeddings: false\n", "optimizer=null", f"optimizer={text}")
    assert not config.optimizer.decay_embeddings
    path = tmp_path / "resolved.yml"
    path.write_text(config.resolved_yaml())
    assert load_config([str(path)]) == config


@pytest.mark.option("override_lr_scheduler", "use_checkpoint_lr_scheduler", "lr_decay_style")
def test_schedules_are_checked_against_each_other(load):
    assert load("lr_end: 1e-5\nlr-decay-style: linear_warmup_cosine\n").schedule.min_lr == 1e-5
    assert load("warmup_iters: 7\n").schedule.warmup_steps(1000) == 7.0
    for text, message in (
        ("lr_formula: fork\nlr_decay_style: wsd\n", "the fork has no style wsd"),
        ("lr_decay_style: wsd\nwsd_decay_shape: exponential\n", "exponential needs min_lr"),
        ("override_lr_scheduler: true\nuse_checkpoint_lr_scheduler: true\n", "contradicts"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(text)


@pytest.mark.option("bf16", "fp16", "precision", "loss_scale")
@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("", "fp32"),
        ("precision: BFloat16\n", "bf16"),
        ("fp16: {enabled: true}\n", "fp16"),
        ("fp16: {enabled: false}\nbf16: {enabled: true}\n", "bf16"),
        ("fp16: {enabled: true, type: bfloat16}\n", "bf16"),
        ("fp16: {enabled: true}\nprecision: fp16\n", "fp16"),
        ("bf16: {bf16: true, enabled: true, loss_scale: 0, hysteresis: 2}\n", "bf16"),
    ],
)
def test_precision(load, text, precision):
    assert load(text).precision == precision


@pytest.mark.option("zero_stage")
def test_zero_forms(load):
    flat = load("zero_stage: 2\nzero_reduce_bucket_size: 1e6\nzero_reduce_scatter: false\n")
    block = load("zero_optimization: {stage: 2, reduce_bucket_size: 1000000, "
                 "reduce_scatter: false, offload_optimizer: {device: none}}\n")  # fmt: skip
    assert flat == block
    with pytest.raises(ConfigError, match="offload_param"):
        load("zero_optimization: {offload_param: {device: cpu}}\n")


@pytest.mark.parametrize("value", ["[[[flash], 2]]", "[[[global, flash], all]]", "[flash, global]"])
def test_attention_of_one_kind_is_accepted(load, value):
    assert load(f"attention_config: {value}\n").ignored[0].startswith("attention_config")


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ("[[[flash], 1], [[local], all]]", ("global", "local")),
        ("[[[Global, BigBird], all]]", ("global", "bigbird")),
        ("[sparse_fixed, sparse_variable]", ("sparse_fixed", "sparse_variable")),
        ("[[[bslongformer], 2]]", ("bslongformer",) * 2),
        ("[[[flash, global], 1]]", None),
    ],
)
def test_attention_by_block(load, value, kinds):
    config = load(f"attention_config: {value}\nsparsity_config: {{block: 4, mode: fixed}}\n")
    assert config.model.attention_config == kinds
    if kinds is None:
        assert config.ignored[1].startswith("sparsity_config: belongs to sparse attention")
        assert config.model.sparsity_config is None
    else:
        assert config.model.sparsity_config.block == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention_config: [[[lokal], all]]", "'lokal' is no kind.*did you mean 'local'"),
        ("attention_config: [[[mamba], all]]", "refused: Mamba blocks"),
        ("attention_config: [[[local], 3]]", "names 3 blocks, but num_layers is 2"),
        ("attention_config: [local]", "names 1 blocks, but num_layers is 2"),
        ("attention_config: [[[local, global, local], all]]", "'all' cannot repeat 3 kinds"),
        ("attention_config: [[[local], 0]]", "how often it is repeated, or all"),
        ("attention_config: [[local, 2]]", "should begin every pair with a list of kinds"),
        ("attention_config: local", "should be a list such as"),
        ("sparsity_config: {attention: bidirectional}", "attention.*unidirectional"),
        ("sparsity_config: {num_different_global_patterns: 2}", "different_layout_per_head"),
        ("sparsity_config: {global_block_end_indices: [0]}", "global_block_end_indices"),
        ("sparsity_config: {blok: 4}", "sparsity_config.blok: unknown key"),
        ("pos_emb: rpe\nrpe_max_distance: 16", "above half of rpe_num_buckets"),
        ("pos_emb: alibi\nreset_position_ids: true", "set reset_attention_mask: true"),
        ("num_kv_heads: 1\nmodel_parallel_size: 2", "does not divide num_kv_heads \\(1\\)"),
    ],
)
def test_mistakes_about_attention_are_named(load, text, said):
    sparse = "" if "attention_config" in text else "attention_config: [[[local], all]]\n"
    with pytest.raises(ConfigError, match=said):
        load(f"{sparse}{text}\n")


def test_settings_of_other_positions_are_noted(load):
    noted = load("rpe_num_buckets: 64\nrpe_max_distance: 64\nopt_pos_emb_offset: 2\n")
    assert [line.split(":")[0] for line in noted.ignored] == [
        "rpe_num_buckets", "rpe_max_distance", "opt_pos_emb_offset",
    ]  # fmt: skip
    assert noted.model == load().model
    assert load("pos_emb: rpe\nrpe_num_buckets: 64\n").model.rpe_num_buckets == 64


def test_norm_biases(load):
    assert load("use_bias_in_norms: true\n") == load()
    assert not load("use_bias_in_norms: false\n").model.use_bias_in_norms
    assert load("norm: rmsnorm\nuse_bias_in_norms: false\n") == load("norm: rmsnorm\n")
    noted = load("norm: scalenorm\nuse_bias_in_norms: true\n")
    assert noted.ignored == ("use_bias_in_norms: scalenorm has no bias",)
    assert not noted.model.use_bias_in_norms


def test_norms_by_their_other_names(load):
    assert load("norm: TE_RMSNorm\n") == load("norm: rmsnorm\n")
    assert load("norm: te_layernorm\n") == load()


def test_tied_norms_belong_to_one_residual(load):
    assert load("gpt_j_tied: true\ngpt_j_residual: true\n").model.gpt_j_tied
    noted = load("gpt_j_tied: true\n")
    assert noted.ignored == ("gpt_j_tied: belongs to gpt_j_residual: true",)
    assert not noted.model.gpt_j_tied


@pytest.mark.option("num_unique_layers")
def test_soft_prompts(load):
    block = "soft_prompt_tuning: {enabled: true, num_tokens: 7, init_range: 0.1}\n"
    config = load(block)
    assert config.model.soft_prompt_tuning.n_tokens == 7
    assert load(block.replace("num_tokens", "n_tokens")) == config
    assert load("soft_prompt_tuning: {enabled: false, n_tokens: 7}\n") == load()
    for other, problem in (
        ("pipe_parallel_size: 2\n", "pipeline"),
        ("zero_stage: 3\n", "ZeRO 3"),
        ("reset_attention_mask: true\n", "reset_attention_mask"),
        ("attention_config: [gmlp, global]\n", "gmlp"),
    ):
        with pytest.raises(ConfigError, match=f"soft_prompt_tuning.*{problem}"):
            load(block + other)
    with pytest.raises(ConfigError, match="init_string needs a tokenizer"):
        load("soft_prompt_tuning: {enabled: true, init_string: Once}\n")
    with pytest.raises(ConfigError, match="mean the same"):
        load("soft_prompt_tuning: {enabled: true, num_tokens: 7, n_tokens: 8}\n")


def test_mixer_blocks(load):
    config = load("attention_config: [[[gmlp, amlp], all]]\ngmlp_attn_dim: 8\n")
    assert config.model.attention_config == ("gmlp", "amlp")
    with pytest.raises(ConfigError, match="not divided among tensor ranks"):
        load("attention_config: [gmlp, global]\nmodel_parallel_size: 2\n")


def test_mup(load):
    block = "use_mup: true\nmup_base_hidden_size: 16\n"
    assert load(block + "base_shapes_file: shapes\n").ignored[0].startswith("base_shapes_file")
    for text, problem in (
        ("use_mup: true\n", "needs mup_base_hidden_size"),
        (block + "init_method: xavier_normal\n", "init_method.*no scale"),
        (block + "pipe_parallel_size: 3\nnum_layers: 3\n", "at most 2 stages"),
        (block + "attention_config: [gmlp, global]\n", "not worked out"),
        (block + "save_base_shapes: true\n", "save_base_shapes.*mup_base_hidden_size"),
        (block + "coord_check: true\n", "coord_check.py"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load(text, without=["num_layers"] if "num_layers" in text else ())


def test_unique_layers_are_only_checked(load):
    (noted,) = load("num_unique_layers: 1\n").ignored
    assert "layers do not share weights" in noted
    for value in ("3", "0", "true", "x"):
        with pytest.raises(ConfigError, match="num_unique_layers"):
            load(f"num_unique_layers: {value}\n")


def test_fields_keep_their_names():
    assert {"num_layers", "train_iters", "log_interval", "warmup", "hostfile"} <= FIELDS.keys()
