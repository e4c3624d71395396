"""evaluate.py and generate.py as a user starts them, on a run that was evaluated in training."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import local_tasks, runs

from megatron.config import load_config
from megatron.errors import NeomixError
from megatron.inference.tasks import numbers
from megatron.monitor.report.page import write_report
from megatron.training.inference import task_request
from megatron.training.inference_options import find_model, preflight_inference


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def done(result: runs.Done) -> str:
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    runs.make_data(folder / "data")
    tokenizer = local_tasks.make_tokenizer(folder / "tokenizer.json")
    local_tasks.make_tasks(folder / "tasks")
    content = runs.config(
        folder / "data",
        folder / "run",
        vocab_size=290,
        num_gpus=1,
        train_iters=4,
        save_interval=2,
        eval_interval=4,
        seq_length=48,
        init_method_std=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tokenizer_type="HFTokenizer",
        vocab_file=str(tokenizer),
        eval_include_path=str(folder / "tasks"),
        eval_tasks=list(local_tasks.TASKS),
        eval_tasks_interval=2,
        eval_limit=4,
    )
    file = runs.write_config(folder / "run.yml", content)
    runs.train(file)
    return file


def exported_numbers(run: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Return what lm-eval's own model of transformers gives on the exported newest checkpoint."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    done(
        runs.tool(
            "convert_checkpoint.py", "--input", str(run.parent / "run"), "--to", "hf",
            "--output", str(folder),
        )
    )  # fmt: skip
    found = simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", batch_size=2),
        tasks=list(local_tasks.TASKS),
        task_manager=TaskManager(include_path=[str(run.parent / "tasks")], include_defaults=False),
        limit=4,
        bootstrap_iters=0,
        log_samples=False,
    )
    return numbers(found)


@pytest.mark.option("eval_tasks", "eval_results_prefix")
def test_live_saved_and_exported_models_agree(run, tmp_path):
    live = {
        record["step"]: record["tasks"]
        for record in lines(run.parent / "run" / "metrics.jsonl")
        if "tasks" in record
    }
    assert sorted(live) == [2, 4]
    assert live[2] != live[4]
    prefix = tmp_path / "out" / "mine"
    done(
        runs.run(
            "evaluate.py", run, "--all-checkpoints", "--eval_perplexity", "valid",
            "--eval_results_prefix", prefix, "--set", "num_gpus=4", "model_parallel_size=2",
            "pipe_parallel_size=2",
        )
    )  # fmt: skip
    (table,) = tmp_path.glob("out/mine_eval_checkpoints_*.csv")
    rows = {int(row["step"]): row for row in csv.DictReader(table.open(encoding="utf-8"))}
    assert sorted(rows) == [2, 4]
    for step, tasks in live.items():
        for task, metrics in tasks.items():
            for name, value in metrics.items():
                if "stderr" not in name:
                    found = float(rows[step][f"{task}/{name}"])
                    assert found == pytest.approx(value, rel=1e-4, abs=1e-9), (step, task, name)
    theirs = exported_numbers(run, tmp_path / "hf")
    assert set(theirs) == set(local_tasks.TASKS)
    for task, metrics in theirs.items():
        for name, value in metrics.items():
            if "stderr" not in name:
                found = float(rows[4][f"{task}/{name}"])
                assert found == pytest.approx(value, rel=1e-4, abs=1e-9), (task, name)
    measured = [r for r in lines(run.parent / "run" / "metrics.jsonl") if "valid_loss" in r][-1]
    for domain, loss in measured["valid_loss"].items():
        assert float(rows[4][f"loss/{domain}"]) == pytest.approx(loss, rel=1e-5)
    assert "validation/weighted_avg_ppl" in measured
    for name, value in measured.items():
        if name.startswith("validation/"):
            assert float(rows[4][name]) == pytest.approx(value, rel=1e-5)
    page = write_report([run.parent / "run"], tmp_path / "report.html").read_text("utf-8")
    assert 'id="tasks"' in page
    assert "local_choice" in page
    assert 'id="checkpoints"' in page
    assert f"{float(rows[2]['validation/weighted_avg_ppl']):.4f}" in page


@pytest.mark.slow
def test_generation_is_the_same_under_a_pipeline_and_at_the_keyboard(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab cab\nbad dab add\n\nfade\n", encoding="utf-8")
    options = ("--iteration", "2", "-i", prompts)
    setting = ("--set", "text_gen_type=input-file", "maximum_tokens=6", "temperature=1.0")
    output = tmp_path / "samples.jsonl"
    layout = ("num_gpus=2", "pipe_parallel_size=2", "recompute=true")
    done(runs.run("generate.py", run, *options, "-o", output, *setting, *layout))
    found = lines(output)
    assert [sample["context"] for sample in found] == ["ab cab", "bad dab add", "fade"]
    assert {sample["length"] for sample in found} <= set(range(7))
    typed = subprocess.run(
        runs.command("generate.py", run, *options[:2], "--set", "text_gen_type=interactive",
                     "maximum_tokens=6", "temperature=1.0"),
        env=runs.environment(), input="ab cab\nbad dab add\n",
        capture_output=True, text=True, timeout=240,
        check=True,
    )  # fmt: skip
    # One rank, each prompt by itself, keys and values kept: the same draws.
    for sample in found[:2]:
        assert f"Generated Text: {sample['text']}" in typed.stdout


@pytest.mark.parametrize(
    ("script", "changes", "said"),
    [
        ("evaluate.py", ["eval_tasks=[]"], "nothing is to be measured"),
        ("evaluate.py", ["iteration=3"], "no checkpoint of step 3; it has 2, 4"),
        ("evaluate.py", ["tokenizer_type=null", "vocab_file=null"], "needs the tokenizer"),
        ("evaluate.py", ["num_layers=3"], "num_layers"),
        ("generate.py", [], "say where prompts come from"),
        (
            "generate.py",
            ["text_gen_type=input-file", "sample_input_file=/none"],
            "/none cannot be read",
        ),
    ],
)
def test_what_cannot_start_is_said_before_it_starts(run, script, changes, said):
    config = load_config([str(run)], overrides=changes)
    with pytest.raises(NeomixError, match=re.escape(said)):
        preflight_inference(config, world_size=1, gpus=0, script=script)


@pytest.mark.option("eval_num_fewshot")
def test_examples_are_asked_for(run):
    config = load_config([str(run)], overrides=["eval_num_fewshot=2"])
    assert task_request(config).num_fewshot == 2
    assert task_request(load_config([str(run)])).num_fewshot is None


def test_the_newest_checkpoint_is_taken(run):
    config = load_config([str(run)])
    found = find_model(config, step=None, verified=True, say=print)
    assert found.manifest.step == 4
    assert find_model(config, step=2, verified=True, say=print).manifest.step == 2
