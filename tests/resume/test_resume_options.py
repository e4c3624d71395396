"""Data options and live evaluation across interruptions: nothing changes, is lost or done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import local_tasks, relayout, runs
from support.pool import RankPools

from megatron.data.reader import TokenReader
from megatron.data.writer import TokenWriter
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.train import train_byte_level_bpe

STEPS, EVERY = 7, 3
DOMAINS = ("first", "second")
MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tokenizer, text of two domains with labels beside, and tasks."""
    folder = tmp_path_factory.mktemp("options")
    vocabulary = folder / "tokenizer.json"
    texts = [local_tasks.text(seed, 5 + seed % 30) for seed in range(160)]
    train_byte_level_bpe(
        texts, vocabulary, vocab_size=290, special_tokens=("<|endoftext|>", *MARKS)
    )
    tokenizer = build_tokenizer("HFTokenizer", str(vocabulary))
    for number, name in enumerate(DOMAINS):
        with TokenWriter(folder / name, np.uint16) as writer:
            for text in texts[number::2]:
                writer.add(np.array([*tokenizer.encode(text), tokenizer.eod], dtype=np.uint16))
        with (
            TokenReader(folder / name) as tokens,
            TokenWriter(folder / f"{name}-l", "int32") as out,
        ):
            read = tokens.read(0, tokens.num_tokens).astype(np.int64)
            sizes = tokens.document_sizes(0, tokens.num_documents)
            out.add_many(np.where(read % 3 == 1, read, -100), sizes)
    local_tasks.make_tasks(folder / "tasks")
    return folder


def write(folder: Path, name: str, *, labels: bool = False, **changes: Any) -> Path:
    content = runs.config(
        folder,
        folder / name,
        **{
            "domains": {
                domain: {
                    "train": str(folder / domain),
                    **({"train_labels": str(folder / f"{domain}-l")} if labels else {}),
                }
                for domain in DOMAINS
            },
            "num_gpus": 1,
            "num_layers": 1,
            "seq_length": 48,
            "vocab_size": 300,
            "tokenizer_type": "HFTokenizer",
            "vocab_file": str(folder / "tokenizer.json"),
            "train_batch_size": 4,
            "train_iters": STEPS,
            "eval_interval": 5,
            "eval_iters": 1,
            "save_interval": STEPS,
            **changes,
        },
    )
    return runs.write_config(folder / f"{name}.yml", content)


CASES: dict[str, dict[str, Any]] = {
    "filled in, with tasks": {
        "fim_rate": 0.8,
        "pack_impl": "unpacked",
        "eval_tasks": ["local_next", "local_choice"],
        "eval_tasks_interval": 3,
        "eval_num_fewshot": 1,
        "eval_limit": 2,
    },
    "labelled and packed": {
        "labels": True,
        "pack_impl": "pack_until_overflow",
        "eod_mask_loss": True,
        "eod_token_id": 0,
        "reset_attention_mask": True,
        "pos_emb": "learned",
    },
}


@pytest.mark.option("fim_rate", "eval_tasks_interval")
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed(folder: Path, pools: RankPools, case: str, monkeypatch: Any) -> None:
    options = CASES[case]
    options = options | (
        {"eval_include_path": str(folder / "tasks")} if "eval_tasks" in options else {}
    )
    short = case.split()[0].strip(",")
    whole, parts, plain = (folder / f"{short}-{kind}" for kind in ("whole", "parts", "plain"))
    file = write(folder, whole.name, **options)
    assert pools.call(relayout.train, 1, file) == [0]
    # A stop after a step at which tasks are measured, and one elsewhere.
    file = write(folder, parts.name, **options, exit_interval=EVERY)
    for stop in (*range(EVERY, STEPS, EVERY), STEPS):
        assert pools.call(relayout.train, 1, file) == [0]
        assert runs.steps_done(parts) == stop
    runs.assert_same_run(whole, parts, STEPS)
    # Without the option other tokens are trained on.
    assert pools.call(relayout.train, 1, write(folder, plain.name)) == [0]
    losses = [
        [record["domain_loss"] for record in runs.records(run, "mixture")] for run in (whole, plain)
    ]
    assert losses[0] != losses[1]
    if "eval_tasks" in options:
        lines = (parts / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [line for line in map(json.loads, lines) if "tasks" in line]
        assert [line["step"] for line in measured] == [3, 6, 7]
        assert measured[0]["num_fewshot"] == {"local_next": 1, "local_choice": 1}
        assert measured[0]["tasks"] != measured[2]["tasks"]


@pytest.mark.option("iteration", "load")
def test_a_run_goes_on_from_one_checkpoint_of_another(folder: Path, pools: RankPools) -> None:
    """By ``load`` and ``iteration``: with its optimizer, its data and its step."""
    old = write(folder, "old", save_interval=2)
    assert pools.call(relayout.train, 1, old) == [0]
    new = write(folder, "new", load=str(folder / "old" / "checkpoints"), iteration=4)
    assert pools.call(relayout.train, 1, new) == [0]
    steps = [record["step"] for record in runs.records(folder / "new", "mixture")]
    assert steps == [5, 6, 7]
    for name in ("mixture", "samples"):
        assert runs.records(folder / "new", name) == runs.records(folder / "old", name)[4:]
    assert runs.weights_hash(folder / "new", STEPS) == runs.weights_hash(folder / "old", STEPS)


@pytest.mark.option("valid_label_data_paths", "test_label_data_paths")
def test_labels_of_held_out_data(folder: Path, pools: RankPools) -> None:
    """What the labels leave out is not measured either."""
    found = {}
    for split in ("none", "valid", "test"):
        domains = {
            name: {
                "train": str(folder / name),
                **{part: str(folder / name) for part in ("valid", "test")},
                **({} if split == "none" else {f"{split}_labels": str(folder / f"{name}-l")}),
            }
            for name in DOMAINS
        }
        file = write(folder, f"held-{split}", domains=domains, train_iters=1, save_interval=1)
        assert pools.call(relayout.train, 1, file) == [0]
        records = runs.records(folder / f"held-{split}", "metrics")
        found[split] = [
            next(r[f"{part}_loss"] for r in records if f"{part}_loss" in r)
            for part in ("valid", "test")
        ]
    (valid, test), labelled = found["none"], (found["valid"], found["test"])
    assert labelled[0][0] != valid
    assert labelled[0][1] == test
    assert labelled[1][0] == valid
    assert labelled[1][1] != test
