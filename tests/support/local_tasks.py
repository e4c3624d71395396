"""Tasks of lm-eval made of local files: one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from megatron.tokenizer.train import train_byte_level_bpe

WORDS = ["ab", "cab", "bad", "dab", "add", "cad", "bead", "deaf", "fade", "cafe", "babe", "face"]
TASKS = ("local_next", "local_choice", "local_rolling", "local_write")


def text(seed: int, words: int) -> str:
    """Return made-up text."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words).tolist())


def make_tokenizer(path: Path) -> Path:
    """Train a small byte-level tokenizer; return its file."""
    train_byte_level_bpe([text(seed, 50) for seed in range(20)], path, vocab_size=290)
    return path


def make_tasks(folder: Path) -> Path:
    """Write four tasks and a group of them; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            # Some contexts are longer than the tests' models take.
            "question": text(number, 5 if number % 3 else 60),
            "answer": text(100 + number, 2),
            "choices": [text(200 + number + k, 1 + k) for k in range(3)],
            "label": number % 3,
            "page": text(300 + number, 20 * (1 + number % 3)),
        }
        for number in range(11)
    ]
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "metadata": {"version": 1.0},
    }
    question = {"doc_to_text": "Q: {{question}}\nA:", "target_delimiter": " "}
    tasks = {
        "local_next": {
            **question,
            "output_type": "loglikelihood",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "local_choice": {
            **question,
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "local_write": {
            **question,
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 9},
            "metric_list": [
                {"metric": "exact_match"},
                {"metric": "chrf"},
            ],
        },
    }
    for name, task in tasks.items():
        content = {"task": name, **common, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder
