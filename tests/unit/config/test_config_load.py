from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import load_config
from megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def problem(load, text, *overrides, **options):
    with pytest.raises(ConfigError) as error:
        load(text, *overrides, **options)
    return str(error.value)


def test_defaults_and_attributes(load):
    config = load()
    assert config.model.num_kv_heads == 4
    assert config.model.max_position_embeddings == 128
    assert config.model.intermediate_size == 256
    assert config.precision == "fp32"
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.type == "adamw"
    assert config.gradient_clipping == 1.0
    assert config.domains["prose"].train == ("data/a", "data/b")
    assert config.domains["code"].train == ("data/code",)
    assert config.domains["code"].uses_split
    assert config.mixing.method == "static"
    assert config.mixing.weights is None
    assert config.split == "969, 30, 1"
    assert config.run_dir == "runs/default"
    assert config.checkpoint.save_dir == "runs/default/checkpoints"
    assert config.checkpoint.load_dir == "runs/default/checkpoints"
    assert config.log_dir == "runs/default/logs"
    assert config.zero_stage == 1
    assert config.ignored == ()


def test_configuration_is_frozen(load):
    config = load()
    with pytest.raises(Exception, match="frozen"):
        config.model.hidden_size = 3


def test_hyphens_equal_underscores_at_every_known_level(load):
    config = load(
        "eval-interval: 7\nzero-optimization: {stage: 2, reduce-bucket-size: 5e8}\n"
        "mixing: {method: odm, smoothing-factor: 0.5, warmup-steps: 3, floor: {prose: 0.1}}\n"
        "fp16: {enabled: true, loss-scale-window: 10}\n"
    )
    assert config.training.eval_interval == 7
    assert config.zero.stage == 2
    assert config.zero.options == {"reduce_bucket_size": 500_000_000}
    assert config.mixing.options["smoothing_factor"] == 0.5
    assert config.fp16.loss_scale_window == 10


def test_domain_names_keep_their_hyphens(load):
    config = load(
        "  stack-exchange: {train: x, weight: 1}\n  stack_exchange: {train: y, weight: 2}\n"
        "  no: {train: z, weight: 1}\n  2023: {train: w, weight: 1}\n"
    )
    assert list(config.domains) == ["code", "prose", "stack-exchange", "stack_exchange", "no",
                                    "2023"]  # fmt: skip


def test_bounds_may_name_groups(load):
    config = load(
        "  web/high: {train: x, weight: 1}\n  web/low: {train: y, weight: 2}\n"
        "mixing: {method: odm, groups: {}, floor: {web: 0.5, web/low: 0.2}, ceiling: 0.6}\n"
    )
    assert config.mixing.options["floor"] == {"web": 0.5, "web/low": 0.2}
    assert list(config.domains) == ["code", "prose", "web/high", "web/low"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eval-interval: 1\neval_interval: 2\n", ":12: eval_interval: written twice"),
        ("eval-interval: 1\neval_interval: 1\n", "(.*:11)"),
        ("eval_interval: 1\neval_interval: 1\n", ":12: eval_interval: written twice"),
        ("mixing: {method: odm, warmup-steps: 1, warmup_steps: 1}\n", "written twice"),
        ("hiden_size: 3\n", ":11: hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("eval_interval: often\n", ":11: eval_interval: 'often': should be a whole number"),
        ("eval_interval: 1.5\n", "should be a whole number"),
        ("eval_interval: true\n", "eval_interval: true: should be a whole number"),
        ("eval_interval: 0\n", "eval_interval: 0: should be greater than or equal to 1"),
        ("use_wandb: 1\n", "should be true or false"),
        ("wandb_run_name: 7\n", "should be a text"),
        ("norm: layernom\n", "did you mean 'layernorm'?"),
        ("optimizer-type: SN3\n", "SN3.*is not offered; use one of Adam, .*did you mean 'SM3'"),
        ("mixing: {method: omd}\n", "unknown mixing method; did you mean 'odm'"),
        ("mixing: {method: odm, smothing_factor: 1}\n", "did you mean 'smoothing_factor'?"),
        ("mixing: {method: odm, smoothing_factor: x}\n", "mixing.smoothing_factor: 'x'"),
        ("mixing: {method: odm, smoothing_factor: 2}\n", "smoothing_factor"),
        ("mixing: {method: odm, floor: {porse: 0.1}}\n", "no domain 'porse'; did you mean 'prose'"),
        ("mixing: {method: odm, floor: 0.6}\n", "floors of 2 domains sum to 1.2"),
        ("mixing: {method: odm, ceiling: [0.1, 0.1]}\n", "ceilings of 2 domains sum to 0.2"),
        ("mixing: {method: odm, ceiling: [0.1]}\n", "1 values for 2 domains"),
        ("mixing: odm\n", "mixing: 'odm': should be a block"),
        (
            "  more: {trian: x, weight: 1}\n",
            "domains.more.trian: unknown key; did you mean 'train'",
        ),
        ("  more: {weight: 1}\n", ":11: domains.more: 'train' is missing"),
        ("  more: {train: x}\n", "domains.more: has no weight, though other domains have one"),
        ("  more: {train: 5, weight: 1}\n", "domains.more.train: 5: should be a list"),
        ("  more: {train: [], weight: 1}\n", "domains.more.train"),
        ("  more: {train: x, weight: -1}\n", "domains.more.weight: -1"),
        ("  more: x\n", "domains.more: 'x': should be a block"),
        (
            "mixing: {method: odm, guardrail: {}}\neval_iters: 0\n",
            "mixing.guardrail: eval_iters is 0",
        ),
        ("mixing: {method: odm, guardrail: {}}\neval_interval: 100000000\n", "no validation comes"),
        (
            "mixing: {method: odm, groups: {members: {all: [code, prose]}}, floor: {al: 0.1}}\n",
            "there is no domain or group 'al'; did you mean 'all'",
        ),
        ("  a//b: {train: x, weight: 1}\n", "a domain's name has"),
        ("  a/../b: {train: x, weight: 1}\n", "a domain's name has"),
        ("split: 1,2,3,4\n", "is not a split"),
        ("split: 0,1,1\n", "train must be above 0"),
        ("min_lr: 0.1\n", "min_lr: 0.1: is above the peak learning rate"),
        ("num_kv_heads: 3\n", "does not divide num_attention_heads"),
        ("rotary_pct: 0.1\n", "rotates 1 of"),
        ("max_position_embeddings: 64\n", "is longer than max_position_embeddings"),
        ("train_batch_size: 6\n", "train_batch_size: 6: is not divisible"),
        ("tokenizer_type: HFTokenizer\n", "needs vocab_file"),
        ("vocab_file: x\n", "tokenizer_type should say"),
        ("deepspeed_extra_args: {optimizer: {}}\n", "use the optimizer block"),
        ("zero_optimization: {stage: 4}\n", "zero_optimization.stage: 4"),
        ("zero_optimization: {stage: [1, 2]}\n", "zero_optimization.stage"),
        ("zero_optimization: {reduce_buckt_size: 4}\n", "did you mean 'reduce_bucket_size'"),
        ("zero_optimization: {reduce_bucket_size: big}\n", "whole number of elements"),
        ("zero_optimization: {offload_optimizer: {device: nvme}}\n", "should be cpu or none"),
        ("zero_optimization: {offload_optimizer: {devise: cpu}}\n", "did you mean 'device'"),
        ("zero_optimization: {offload_optimizer: cpu}\n", "should be a block"),
        ("zero_optimization: {cpu_offload: 1}\n", "should be true or false"),
        (
            "zero_optimization: {stage: 2, offload_param: {device: cpu}}\n",
            "offload_param belongs to stage 3, and the stage is 2",
        ),
        ("pipe_parallel_size: 99\n", "is above num_layers"),
        (
            "pipe_parallel_size: 2\nzero_optimization: {stage: 2}\n",
            "zero_optimization.stage: 2: .*use zero_optimization: {stage: 1}, or no pipeline",
        ),
        (
            "sequence_parallel: true\nmodel_parallel_size: 2\n"
            "deepspeed_extra_args: {pipeline: {pipe_partitioned: true}}\n",
            "pipeline: pipe_partitioned takes the activations of tensor ranks for copies",
        ),
        (
            "pipe_parallel_size: 2\ngradient_clipping: 1.0\n"
            "deepspeed_extra_args: {zero_optimization: {stage: 0}}\n",
            "zero_optimization: stage 0 is forced.*clips by the first stage's norm alone",
        ),
        ("pipe_partition_method: layers\n", "should be 'parameters', 'uniform' or 'type:REGEX'"),
        ("pipe_partition_method: 'type:('\n", "should be 'parameters', 'uniform' or 'type:REGEX'"),
        ("model_parallel_size: 3\n", "model_parallel_size: 3: does not divide num_attention"),
        ("pos_emb: alibo\n", "did you mean 'alibi'"),
        ("attention_config: [[[sparse_fixt, global], all]]\n", "did you mean 'sparse_fixed'"),
        ("on_nonfinite: skip\n", "should be 'stop' or 'skip\\(k\\)'"),
        ("intermediate_size: 1000\nexpansion_factor: 4\n", "expansion_factor.*contradicts"),
        ("betas: [0.9, 0.95]\n", "belongs into the block 'optimizer"),
        ("method: odm\n", "belongs into the block 'mixing'"),
        ("precision: bf16\nfp16: {enabled: true}\n", "contradicts precision"),
        ("lr: 2e-3\n", ":11: lr: 0.002: contradicts optimizer.params.lr: 0.001 in .*:7"),
        ("checkpoint_scale: log\n", "needs checkpoint_factor"),
        ("keys_without_effect: 5\n", "keys_without_effect"),
    ],
)
def test_every_problem_has_place_value_and_remedy(load, text, said):
    message = problem(load, text)
    plain = said in message
    assert plain or re.search(said, message, re.DOTALL), message
    assert ".yml:" in message


def test_required_values_are_named(files):
    with pytest.raises(ConfigError) as error:
        files.load("seed: 1\n")
    for key in ("num_layers", "hidden_size", "num_attention_heads", "optimizer.params.lr",
                "domains", "train_iters"):  # fmt: skip
        assert f"{key}: required" in str(error.value)
    assert "None" not in str(error.value)


def test_batch_size_is_required(load):
    assert "train_micro_batch_size_per_gpu: required" in problem(
        load, "", without=["train_micro_batch_size_per_gpu"]
    )


def test_all_problems_are_listed_in_order(load):
    message = problem(
        load, "hiden_size: 1\neval_interval: x\npos_emb: alibo\nmixing: {method: odm, flor: 1}\n"
    )
    assert message.startswith("4 problems in the configuration:\n")
    places = [int(match) for match in re.findall(r"a\.yml:(\d+):", message)]
    assert places == [11, 12, 13, 14]


def test_several_files_merge(files, load):
    one = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 8\n"
    two = "optimizer: {type: Adam, params: {lr: 0.1}}\ntrain_iters: 3\ntrain_batch_size: 2\n"
    three = "domains: {a: {train: x}}\noptimizer: {params: {lr: 0.1, eps: 1e-6}}\nnum-layers: 2\n"
    config = files.load(one, two, three, "domains: {b: {train: y}, a: {train: x}}\n")
    assert list(config.domains) == ["a", "b"]
    assert config.optimizer.eps == 1e-6


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ("seed: 1\n", "seed: 2\n", "b.yml:1: seed: 2 contradicts 1 in .*a.yml:1"),
        ("seed: 1\n", "\nse-ed: 2\n", None),
        ("wandb-team: x\n", "wandb_team: y\n", "wandb_team: 'y' contradicts 'x'"),
        ("deterministic: true\n", "deterministic: 1\n", "contradicts true"),
        ("domains: {a: {train: x}}\n", "domains: {a: {train: y}}\n", "domains.a.train: 'y'"),
        ("mixing: {method: odm}\n", "mixing: {method: exp3}\n", "mixing.method: 'exp3'"),
    ],
)
def test_files_may_not_contradict_each_other(files, first, second, where):
    with pytest.raises(ConfigError) as error:
        files.load(first, second)
    if where:
        assert re.search(where, str(error.value)), str(error.value)


def test_same_value_in_two_files_is_fine(files, load):
    config = load("seed: 3\n")
    assert load_config([str(files.folder / "a.yml")] * 2) == config


def test_overrides_win_over_every_spelling(load):
    config = load(
        "mixing: {method: odm, smoothing_factor: 0.5}\n",
        "lr=5e-4",
        "mixing.method=exp3",
        "mixing.smoothing_factor=null",
        "domains.code.weight=9",
        "domains.new={train: z, weight: 1}",
        "train-iters=7",
        "wandb_run_name='1e-4'",
    )
    assert config.optimizer.lr == 5e-4
    assert config.mixing.method == "exp3"
    assert config.domains["code"].weight == 9
    assert config.domains["new"].train == ("z",)
    assert config.training.train_iters == 7
    assert config.logging.wandb_run_name == "1e-4"


def test_null_override_gives_back_the_default(load):
    config = load("seed: 5\nwandb_team: x\n", "seed=null", "wandb_team=null", "save=")
    assert config.training.seed == 1234
    assert config.logging.wandb_team is None


def test_null_override_of_an_unknown_key_is_an_error(load):
    assert "unknown key" in problem(load, "", "sed=null")


def test_null_override_of_a_required_key_is_missing(load):
    assert "train_iters: required" in problem(load, "", "train_iters=null")


def test_later_override_wins(load):
    assert load("", "seed=1", "seed=2").training.seed == 2


def test_override_problems_name_the_argument(load):
    message = problem(load, "", "hidden_size=65", "optimizer.params.lr=0")
    assert "--set hidden_size=65: hidden_size: 65: is not divisible by num_attention_heads (4)" in (
        message
    )
    assert "--set optimizer.params.lr=0: optimizer.params.lr: 0: should be greater than 0" in (
        message
    )


def test_conf_dir_and_suffix(files, tmp_path, load):
    load()
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yml").rename(tmp_path / "sub" / "1-4B.yml")
    assert load_config(["sub/1-4B"], conf_dir=str(tmp_path)).model.num_layers == 2
    (tmp_path / "sub" / "1-4B.yml").rename(tmp_path / "sub" / "v1.5.yaml")
    assert load_config(["sub/v1.5"], conf_dir=str(tmp_path)).model.num_layers == 2
    with pytest.raises(ConfigError, match=r"sub/none\.yml: no such"):
        load_config(["sub/none"], conf_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no configuration file was given"):
        load_config([])


RICH = """\
precision: fp16
fp16: {initial_scale_power: 12, hysteresis: 3}
zero_optimization: {stage: 3, reduce_bucket_size: 5e8, overlap_comm: true}
activation: swiglu
norm: RMSNorm
num_kv_heads: 2
mlp_multiple_of: 32
lr_decay_style: Cosine
lr_decay_fraction: 0.5
min_lr: 1e-5
checkpoint_scale: log
checkpoint_factor: 2
extra_save_iters: [0, 5]
on_nonfinite: Skip( 3 )
wandb_run_name: "1e-4"
wandb_group: "no"
comet_tags: [a, "1"]
comet_others: {a: {b: [1, x, null, 1.5]}}
deepspeed_extra_args: {zero_optimization: {stage: 0}, comms_logger: {enabled: false}}
detect_nvlink_pairs: true
vocab_file: v
merge_file: m
tensorboard_dir: tb
mixing:
  method: schedule
  weights: given
  floor: {code: 0.1}
  stages: [{weights: uniform, fraction: 0.5}, {weights: {code: 0.2, prose: 0.8}}]
"""


def test_resolved_configuration_reloads_equal(load, files):
    for text in ("", RICH, "mixing: {method: odm}\nbf16: {enabled: true}\n"):
        config = load(text)
        again = load_config([files.write(config.resolved_yaml(), "resolved.yml")])
        assert again == config
        assert again.hash() == config.hash()
        assert again.resolved_yaml() == config.resolved_yaml()


def test_rich_configuration(load):
    config = load(RICH)
    assert config.model.intermediate_size == 192  # 8/3 × 64 = 170, up to a multiple of 32
    assert config.model.norm == "rmsnorm"
    assert config.training.nonfinite_limit == 3
    assert config.zero_stage == 0  # forced
    assert config.tokenizer.tokenizer_type == "GPT2BPETokenizer"
    assert config.logging.use_tensorboard
    assert config.schedule.decay_steps(100) == 50
    assert config.ignored == ("detect_nvlink_pairs: devices are taken in the order of the driver",)


def test_hash_follows_what_is_computed(load):
    config = load()
    assert load("run_dir: elsewhere\nlog_interval: 3\nnum_gpus: 2\n").hash() == config.hash()
    assert load("eval_limit: 3\ntext_gen_type: interactive\n").hash() == config.hash()
    for text in ("seed: 1\n", "mixing: {method: odm}\n", "bf16: {enabled: true}\n"):
        assert load(text).hash() != config.hash()
    assert load("", "domains.code.weight=2").hash() != config.hash()


def test_weights_as_a_mapping(load):
    config = load("mixing: {weights: {code: 0.25, prose: 0.75}}\n", "domains.code.weight=null",
                  "domains.prose.weight=null")  # fmt: skip
    assert [domain.weight for domain in config.domains.values()] == [0.25, 0.75]
    assert config.mixing.weights == "given"
    assert "contradicts domains.code.weight" in problem(load, "mixing: {weights: {code: 5}}\n")
    assert "no domain 'cod'" in problem(load, "mixing: {weights: {cod: 1}}\n")


def test_bytes_of_a_malicious_file_run_nothing(files, tmp_path):
    target = tmp_path / "sentinel"
    text = f"a: !!python/object/apply:os.mkdir ['{target}']\n"
    with pytest.raises(ConfigError, match="tag"):
        files.load(text)
    assert not target.exists()


def test_config_imports_neither_torch_nor_mixing():
    code = (
        "import sys, megatron.config; "
        "bad = {'torch', 'deepspeed', 'numpy', 'megatron.mixing'} & set(sys.modules); "
        "print(*bad); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_registry_must_be_filled(monkeypatch, load):
    from megatron.registry import mixing_methods

    monkeypatch.setattr(mixing_methods, "_entries", {})
    with pytest.raises(RuntimeError, match=r"import megatron\.mixing"):
        load()
