"""A project like a reader's own, but tiny: the repository's commands run in it in seconds.

Programs are those of the repository; configurations are copies, with models and batches made
small; data that the documents speak of is there, a few kilobytes of each.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

from support.source import ROOT

from megatron.data.ingest.pipeline import preprocess
from megatron.data.ingest.settings import PreprocessSettings
from megatron.tokenizer.train import train_byte_level_bpe

PROGRAMS = ("megatron", "tools", "examples", "Makefile", "constraints.txt", "pyproject.toml")
# Configuration files whose runs are really done, and what is made smaller in them.
SHRUNK = ("local/*.yml", "mixbench/base.yml")
SMALL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "eval_iters": 1,
}
WORDS = {
    "code": "def return self import x = ( ) : + [ ] for in",
    "prose": "the a of and to was she",
}
QUICKSTART = ("code", "docstrings", "manual", "bytecode", "unicode", "arithmetic", "records")
PARTS = ("train", "valid", "test")
# Corpora of configs/data that a document's --check opens.
CORPORA = ("slimpajama", "pile")


def make_project(root: Path) -> Path:
    """Make the project in an empty folder and return it."""
    for name in (*PROGRAMS, *(path.name for path in ROOT.glob("*.py"))):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", root / "configs")
    for pattern in SHRUNK:
        for path in (root / "configs").glob(pattern):
            path.write_text(shrunk(path.read_text(encoding="utf-8")), encoding="utf-8")
    _texts(root)
    _data(root)
    _python(root)
    (root / "hosts").write_text("worker-0 slots=8\nworker-1 slots=8\n", encoding="utf-8")
    (root / "prompts.txt").write_text("def return\nthe a of\n", encoding="utf-8")
    return root


def shrunk(text: str) -> str:
    """Return a configuration with its sizes made small, and nothing else changed."""
    for key, value in SMALL.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
    return text


def environment(root: Path) -> dict[str, str]:
    """Return the environment of a reader's shell in the project, on the CPU."""
    places = [str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {
        "PATH": os.pathsep.join(places),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


def _texts(root: Path) -> None:
    drawn = random.Random(0)
    (root / "corpus").mkdir()
    chats = []
    for name, words in WORDS.items():
        lines = [
            json.dumps({"text": " ".join(drawn.choices(words.split(), k=drawn.randint(40, 160)))})
            for _ in range(400)
        ]
        for path in (root / f"{name}.jsonl", root / "corpus" / f"{name}.jsonl"):
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for _ in range(20):
            asked, said = (" ".join(drawn.choices(words.split(), k=12)) for _ in range(2))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            chats.append(json.dumps({"text": f"{asked} {said}", "conversation": turns}))
    (root / "chats.jsonl").write_text("\n".join(chats) + "\n", encoding="utf-8")


def _data(root: Path) -> None:
    own = root / "data" / "own"
    own.mkdir(parents=True)
    tokenizer = own / "tokenizer.json"
    texts = [json.loads(line)["text"] for name in WORDS for line in (root / f"{name}.jsonl").open()]
    train_byte_level_bpe(iter(texts), str(tokenizer), vocab_size=320)
    shutil.copy(tokenizer, root / "tokenizer.json")
    for name in WORDS:
        preprocess(
            PreprocessSettings(
                inputs=(str(root / f"{name}.jsonl"),),
                output_prefix=str(own / name),
                tokenizer_type="HFTokenizer",
                vocab_file=str(tokenizer),
                append_eod=True,
            )
        )
    _chat_model(root, tokenizer)
    quickstart = root / "data" / "quickstart"
    quickstart.mkdir()
    shutil.copy(tokenizer, quickstart / "tokenizer.json")
    for number, domain in enumerate(QUICKSTART):
        for part in PARTS:
            _copy(own, quickstart / domain / f"{part}_text_document", number)
    for number, name in enumerate(("code", "web")):
        _copy(own, root / "data" / f"{name}_text_document", number)
    for corpus in CORPORA:
        text = (ROOT / "configs" / "data" / f"{corpus}.yml").read_text(encoding="utf-8")
        for number, prefix in enumerate(re.findall(r"train: (\S+)", text)):
            _copy(own, root / prefix, number)
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    (root / "data" / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (root / "data" / "gpt2-merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def _chat_model(root: Path, tokenizer: Path) -> None:
    """Make what a chat model's folder has of its tokenizer."""
    folder = root / "models" / "chat"
    folder.mkdir(parents=True)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _copy(own: Path, prefix: Path, number: int) -> None:
    """Give a dataset another name: they are two, taken in turn."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    source = own / f"{list(WORDS)[number % 2]}_text_document"
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{source}{suffix}", f"{prefix}{suffix}")


def _python(root: Path) -> None:
    """Let ``python`` and ``./deepy.py`` be run by the Python of the tests."""
    (root / "bin").mkdir()
    for name in ("python", "python3"):
        path = root / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        path.chmod(0o755)
