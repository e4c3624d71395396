from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.config import load_config
from megatron.config.canonical import known_keys
from megatron.config.reference import reference
from megatron.config.schema import json_schema
from megatron.config.source import read_file
from megatron.model.accounting import parameter_count
from megatron.registry import mixing_methods

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(
    path
    for path in ROOT.glob("configs/**/*.yml")
    if "\ntasks:" not in path.read_text()  # a study of many runs, whose keys are its own
)
MODELS = sorted(ROOT.glob("configs/models/*.yml"))


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_committed_documents_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/generate_docs.py", "--check"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_reference_names_every_key_and_option():
    text = reference()
    block_keys = {"optimizer", "bf16", "fp16", "zero_optimization", "domains", "mixing",
                  "deepspeed_extra_args"}  # fmt: skip
    for key in known_keys():
        assert f"`{key}`" in text or (key in block_keys and f"`{key}: {{" in text), key
    for name in mixing_methods:
        assert f"#### `method: {name}`" in text


def test_every_setting_is_described():
    for line in reference().splitlines():
        if line.startswith("| `"):
            assert line.rstrip(" |").count("|") >= 1
            assert not line.endswith("|  |"), line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations_fit_the_schema(validator, path):
    tree = {key: node.plain() for key, node in read_file(path).items()}
    assert [error.message for error in validator.iter_errors(tree)] == []


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("num-layers: 3", True),
        ("num_layers: 3", True),
        ("num_layers: 1.5", False),
        ("num-layers: x", False),
        ("numlayers: 3", False),
        ("moe_num_experts: 1", True),
        ("moe_num_experts: 8", True),
        ("autotuning: {enabled: false}", True),
        ("partition_activations: true", True),
        ("mixing: {method: odm, smoothing-factor: 0.5}", True),
        ("mixing: {method: static, smoothing_factor: 0.5}", False),
        ("mixing: {method: odm, smoothing_factor: x}", False),
        ("mixing: {method: odd}", False),
        ("mixing: {weights: {a: 1}}", True),
        ("domains: {a: {train: x, weight: 1}}", True),
        ("domains: {a: {trian: x}}", False),
        ("on_nonfinite: skip(3)", True),
        ("on_nonfinite: skip", False),
        ("zero_optimization: {stage: 4}", False),
        ("optimizer: {type: Adam, params: {lr: 0.1, betas: [0.9, 0.95]}}", True),
        ("optimizer: {type: Adam, params: {betas: [0.9, 1.0]}}", False),
    ],
)
def test_schema_accepts_and_refuses(validator, text, valid):
    assert validator.is_valid(yaml.safe_load(text)) is valid


def test_resolved_configuration_fits_the_schema(validator, load):
    text = load("mixing: {method: odm, floor: 0.1}\nfp16: {enabled: true}\n").resolved_yaml()
    assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []


def test_schema_is_json_and_committed():
    committed = json.loads((ROOT / "docs/schema.json").read_text())
    assert committed["properties"].keys() == set(known_keys()) | {"keys_without_effect"}


# Without embeddings: Pythia's figures (arXiv 2304.01373, table 1), and NeoX's 19M and 49M.
PARAMETERS = {
    "19M": 18_915_328,
    "49M": 49_236_480,
    "70m": 18_915_328,
    "125M": 85_056_000,
    "160m": 85_056_000,
    "odm_160m": 85_056_000,
    "410m": 302_311_424,
    "odm_410m": 302_311_424,
    "800M": 805_736_448,
    "1B": 805_736_448,
    "odm_1B": 805_736_448,
    "1-4B": 1_208_602_624,
    "2-8B": 2_517_652_480,
    "odm_3B": 2_517_652_480,
    "6-9B": 6_444_163_072,
    "12B": 11_327_027_200,
}
# With embeddings, by the size of the vocabulary: as transformers counts the published weights.
TOTALS = {
    "14m": (50_304, 14_067_712),
    "31m": (50_304, 30_494_720),
    "20B": (50_432, 20_554_567_680),
    "llama2_7B": (32_000, 6_738_415_616),
    "llama2_13B": (32_000, 13_015_864_320),
    "llama2_70B": (32_000, 68_976_648_192),
    "llama3_8B": (128_256, 8_030_261_248),
    "llama3_70B": (128_256, 70_553_706_496),
    "mistral_7B": (32_000, 7_241_732_096),
    "mixtral_8x7B": (32_000, 46_702_792_704),
}


def ready_model(name, vocab_size):
    path = ROOT / f"configs/models/{name}.yml"
    overrides = ["domains={a: {train: x}}", f"vocab_size={vocab_size}"]
    return load_config([str(path)], overrides=overrides).model


@pytest.mark.parametrize("name", PARAMETERS)
def test_ready_models_have_the_published_sizes(name):
    model = ready_model(name, 50_257)
    embeddings = 2 * model.padded_vocab_size(1) * model.hidden_size
    assert parameter_count(model) - embeddings == PARAMETERS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_ready_models_have_the_published_totals(name):
    vocabulary, total = TOTALS[name]
    assert parameter_count(ready_model(name, vocabulary)) == total


@pytest.mark.parametrize("name", ["350M", "760M", "1-3B", "2-7B", "6-7B", "13B", "175B"])
def test_ready_models_of_gpt3_have_about_the_size_they_are_called_by(name):
    called = float(name[:-1].replace("-", ".")) * (1e9 if name.endswith("B") else 1e6)
    assert parameter_count(ready_model(name, 50_257)) == pytest.approx(called, rel=0.19)


DOMAIN = ["domains={a: {train: x, weight: 1}}"]


def test_ready_models_combine_with_every_layout():
    layouts = sorted(ROOT.glob("configs/parallel/*.yml"))
    for path in MODELS:
        model = load_config([str(path)], overrides=DOMAIN).model
        for layout in layouts:
            ranks = read_file(layout).get("model_parallel_size")
            stages = read_file(layout).get("pipe_parallel_size")
            if ranks and (model.num_kv_heads or 1) % ranks.value:
                continue
            if stages and model.num_layers < stages.value:
                continue
            if "moe_expert_parallel_size" in read_file(layout) and model.moe_num_experts == 1:
                continue
            assert load_config([str(path), str(layout)], overrides=DOMAIN).model == model
