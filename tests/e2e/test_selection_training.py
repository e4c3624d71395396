"""Choosing conversations, fine-tuning on them in full and by LoRA, and the target's own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import made_languages as made
from support import runs

TARGET, SHARE = 0, 0.2
STEPS = 20
MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 48,
    "vocab_size": made.VOCABULARY,
    "pack_impl": "unpacked",
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-3}},
    "lr_decay_style": "constant",
    "warmup": 0.0,
    "eval_interval": STEPS,
    "eval_iters": 4,
    "log_interval": 20,
    "num_gpus": 1,
}
LORA = {"rank": 8, "targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}


def tool(name: str, *arguments: str | Path) -> str:
    done = runs.tool(name, *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Place:
    """A corpus of which a fifth is of the target's language, and a model that has read it all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        random = np.random.default_rng(0)
        self.languages = [
            TARGET if at % 5 == 0 else 1 + int(random.integers(made.LANGUAGES - 1))
            for at in range(400)
        ]
        self.chats = made.write_chats(folder / "chats.jsonl", self.languages)
        self.target = made.write_chats(folder / "target.jsonl", [TARGET] * 16, first=10_000)
        held_out = made.write_chats(folder / "held.jsonl", [TARGET] * 64, first=20_000)
        self.tokenizer = made.make_chat_tokenizer(folder / "chat")
        for file, name in ((self.chats, "all"), (held_out, "held")):
            tool(
                "preprocess_data_with_chat_template.py", "--input", file, "--jsonl-keys",
                "messages", "--tokenizer-path", self.tokenizer, "--output-prefix", folder / name,
            )  # fmt: skip
        self.base = self.train("base", domain(folder / "all", "all"), train_iters=100)

    def train(self, name: str, data: dict[str, Any], **keys: Any) -> Path:
        held = str(self.folder / "held_messages_document")
        target = {
            "valid": held,
            "valid_labels": held.replace("document", "label_document"),
            "target": True,
        }
        file = runs.write_config(
            self.folder / f"{name}.yml",
            {
                **MODEL,
                "split": "100,0,0",
                "run_dir": str(self.folder / name),
                "domains": {**data, "heldout": target},
                **keys,
            },
        )
        runs.train(file)
        return self.folder / name

    def tuned(self, name: str, chosen: Path, **keys: Any) -> float:
        """Fine-tune on what was chosen; return the loss of the target's held-out answers."""
        data = yaml.safe_load(chosen.read_text())["domains"]
        folder = self.train(
            name, data, train_iters=STEPS, finetune=True, load=str(self.base), **keys
        )
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["valid_loss"]["heldout"] for line in lines if "valid_loss" in line][-1]

    def choose(self, method: str, *options: str | Path) -> tuple[Path, float]:
        """Keep a fifth; return the fragment and the share of it that is of the target's kind."""
        table = self.folder / f"{method}.parquet"
        tool(
            "select_data.py", "score", "--method", method, "--train", self.chats,
            "--tokenizer-path", self.tokenizer, "--out", table, *options,
        )  # fmt: skip
        tool(
            "select_data.py", "select", "--scores", table, "--share", str(SHARE),
            "--tokenizer-path", self.tokenizer, "--out", self.folder / "chosen", "--name", method,
        )  # fmt: skip
        kept = (self.folder / "chosen" / f"{method}.jsonl").read_text().splitlines()
        places = [int(json.loads(line)["id"].rpartition(":")[2]) for line in kept]
        found = sum(self.languages[place] == TARGET for place in places) / len(places)
        return self.folder / "chosen" / f"{method}.yml", found


def domain(prefix: Path, name: str) -> dict[str, Any]:
    return {
        name: {
            "train": f"{prefix}_messages_document",
            "train_labels": f"{prefix}_messages_label_document",
        }
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("selection"))


@pytest.fixture(scope="module")
def chosen(place) -> dict[str, Path]:
    informed, found = place.choose("bm25", "--target", f"t={place.target}", "--messages", "all")
    random, by_chance = place.choose("random")
    assert found > 0.45
    assert by_chance < 0.3
    return {"bm25": informed, "random": random}


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_tuning_on_what_was_chosen_beats_chance(place, chosen, lora):
    # As many steps over as many documents; scoring by words costs no operation of a model.
    keys = {} if lora is None else {"lora": lora}
    losses = {
        name: place.tuned(f"{name}-{'lora' if lora else 'full'}", fragment, **keys)
        for name, fragment in chosen.items()
    }
    assert losses["bm25"] < losses["random"] - (0.2 if lora is None else 0.08)


@pytest.mark.slow
def test_the_targets_own_tasks_from_local_files(place):
    """Questions in the manner of MMLU, BBH and IFEval, by the task files that come with us."""
    folder, data = place.folder / "tasks", place.folder / "questions"
    folder.mkdir()
    data.mkdir()
    rows = {
        "mmlu": [
            {
                "question": made.text(TARGET, at, 6),
                "choices": [made.text(k, at, 3) for k in range(4)],
                "answer": at % 4,
                "subject": "words",
            }
            for at in range(8)
        ],
        "bbh": [
            {"input": made.text(TARGET, at, 6), "target": made.text(TARGET, at, 2)}
            for at in range(4)
        ],
        "ifeval": [
            {
                "prompt": made.text(TARGET, 1, 6),
                "instruction_id_list": ["punctuation:no_comma", name],
                "kwargs": [{}, {}],
            }
            for name in ("startend:quotation", "detectable_format:json_format")
        ],
    }
    for task, content in rows.items():
        for part in ("", "_test", "_dev"):
            text = "\n".join(json.dumps(row) for row in content)
            (data / f"{task}{part}.jsonl").write_text(text + "\n", encoding="utf-8")
        ready = (runs.ROOT / "configs" / "tasks" / f"{task}_local.yaml").read_text("utf-8")
        ready = ready.replace("data/tasks/", f"{data}/").replace("gen_toks: 512", "gen_toks: 8")
        (folder / f"{task}_local.yaml").write_text(ready.replace("gen_toks: 64", "gen_toks: 8"))
    checks = runs.ROOT / "configs" / "tasks" / "ifeval_local.py"
    (folder / checks.name).write_text(checks.read_text("utf-8"), encoding="utf-8")
    done = runs.run(
        "evaluate.py", place.folder / "base.yml", "--eval_include_path", folder, "--eval_tasks",
        "mmlu_local", "bbh_local", "ifeval_local", "--eval_results_prefix", place.folder / "found",
        "--set", "tokenizer_type=HFTokenizer", f"vocab_file={place.tokenizer / 'bpe.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = place.folder.glob("found*.json")
    found = json.loads(file.read_text())["results"]
    assert 0 <= found["mmlu_local"]["acc,none"] <= 1
    assert "exact_match,get-answer" in found["bbh_local"]
    # Each question has an instruction that a model of no capitals and commas cannot fail at, if it
    # says anything, and one that it cannot follow.
    assert found["ifeval_local"]["prompt_level_strict_acc,none"] == 0
    assert found["ifeval_local"]["inst_level_strict_acc,none"] in (0, 0.25, 0.5)
