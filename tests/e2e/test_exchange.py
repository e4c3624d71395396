"""Coming from Hugging Face and going back, by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from support import runs

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make data, a model with a tokenizer, our checkpoint of it, and a run's configuration."""
    place = tmp_path_factory.mktemp("exchange")
    runs.make_data(place / "data")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, max_position_embeddings=16,
            initializer_range=0.3,
        )
    )  # fmt: skip
    model.save_pretrained(place / "hf")
    done = runs.tool(
        "convert_checkpoint.py", "--input", str(place / "hf"), "--output", str(place / "ours")
    )
    assert done.returncode == 0, done.stderr
    assert "logits agree within" in done.stderr
    content = runs.config(place / "data", place / "run", train_iters=2, model_parallel_size=2)
    model_keys = yaml.safe_load((place / "ours/model.yml").read_text())
    kept = {key: value for key, value in content.items() if key not in model_keys}
    for key in ("rotary_pct", "hidden_dropout", "attention_dropout"):
        kept.pop(key, None)
    kept |= {"load": str(place / "ours"), "precision": "fp32"}
    runs.write_config(place / "run.yml", {**kept, "finetune": True})
    runs.write_config(place / "resume.yml", kept)
    return place


def test_a_run_starts_from_what_was_converted(places: Path) -> None:
    model, run = places / "ours/model.yml", places / "run.yml"
    checked = runs.run("--check", "train.py", model, run)
    assert checked.returncode == 0, checked.stderr
    assert "finetune: the run starts from the weights of" in checked.stdout
    refused = runs.run("--check", "train.py", model, places / "resume.yml")
    assert refused.returncode == 2
    assert "holds weights alone; set finetune: true" in refused.stderr


@pytest.mark.slow
def test_trained_on_and_back(places: Path) -> None:
    done = runs.run("train.py", places / "ours/model.yml", places / "run.yml")
    assert done.returncode == 0, done.stderr
    first = runs.records(places / "run", "metrics")[0]
    assert first["step"] == 0
    out = places / "back"
    options = ["--input", str(places / "run"), "--to", "hf", "--iteration", "2"]
    options += ["--max_shard_size", "20KB", "--output", str(out)]
    done = runs.tool("convert_checkpoint.py", *options)
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    before = transformers.AutoModelForCausalLM.from_pretrained(places / "hf").state_dict()
    state = theirs.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.allclose(state[name], before[name], atol=0.05) for name in state)
    assert not torch.equal(state["lm_head.weight"], before["lm_head.weight"])
    assert json.loads((out / "neomix.json").read_text())["step"] == 2
    again = runs.tool("convert_checkpoint.py", *options)
    assert again.returncode == 2
    assert "is there already" in again.stderr
