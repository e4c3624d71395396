"""Label masks and chat templates: which tokens are trained on, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingest_files import write_jsonl

from megatron.data.domain import open_domain
from megatron.data.ingest.masking import mask_before
from megatron.data.reader import TokenReader
from megatron.data.sidecar import read_sidecar
from megatron.errors import run_command
from megatron.tokenizer import build_tokenizer
from tools import (
    dataset_token_count,
    merge_datasets,
    preprocess_data_with_chat_template,
    preprocess_data_with_mask,
)

Tool = Callable[..., str]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Run a tool's ``main`` in this process; return what it printed."""

    def run(module: Any, *arguments: object, code: int = 0) -> str:
        given = [str(argument) for argument in arguments]
        try:
            found = run_command(lambda: module.main(given))
        except SystemExit as error:  # argparse
            found = int(error.code or 0)
        output = capsys.readouterr()
        assert found == code, output.err
        return output.out + output.err

    return run


def documents(prefix: str) -> list[list[int]]:
    with TokenReader(prefix) as reader:
        starts = [reader.document_start(i) for i in range(reader.num_documents + 1)]
        return [reader.read(*pair).tolist() for pair in itertools.pairwise(starts)]


def naive_mask(document: list[int], marker: list[int]) -> list[int]:
    for place in range(len(document) - len(marker) + 1):
        if document[place : place + len(marker)] == marker:
            end = place + len(marker)
            return [-100] * end + document[end:]
    return document


@pytest.mark.parametrize("marker", [[1], [1, 0], [0, 0, 1], [9]])
def test_masks_are_those_of_a_search_by_hand(marker: list[int]) -> None:
    random = np.random.default_rng(2)
    for _ in range(50):
        sizes = random.integers(0, 9, random.integers(1, 20))
        tokens = random.integers(0, 3, sizes.sum())
        labels = mask_before(tokens, sizes, marker)
        cuts = np.cumsum(sizes)[:-1]
        expected = [naive_mask(part.tolist(), marker) for part in np.split(tokens, cuts)]
        assert [part.tolist() for part in np.split(labels, cuts)] == expected


def test_a_marker_of_the_text_masks_the_prompt(
    tool: Tool, tmp_path: Path, tokenizer_file: str
) -> None:
    tokenizer = build_tokenizer("HFTokenizer", tokenizer_file)
    marker = tokenizer.encode("\nA:")
    texts = [f"Q: {i}?\nA: {i * i} \nA: twice" for i in range(30)] + ["no marker here"]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    common = ["--input", source, "--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer_file]
    ids = ",".join(map(str, marker))
    said = tool(
        preprocess_data_with_mask, *common, "--append-eod", "--mask-before-token", ids,
        "--output-prefix", tmp_path / "o",
    )  # fmt: skip
    tokens, labels = (documents(str(tmp_path / f"o_{k}_document")) for k in ("text", "label"))
    assert labels == [naive_mask(document, marker) for document in tokens]
    for document, own, text in zip(tokens, labels, texts, strict=True):
        trained = tokenizer.decode([token for token in own if token >= 0][:-1])
        assert trained == (text.split("\nA:", 1)[1] if "\nA:" in text else text)
        assert own[-1] == document[-1] == tokenizer.eod
    count = sum(token >= 0 for own in labels for token in own)
    assert f"{count:,} of {sum(map(len, tokens)):,} tokens are trained on" in said
    counted = tool(dataset_token_count, "--labels", tmp_path / "o_label_document")
    assert f"{sum(map(len, tokens)):,} tokens in 31 documents, {count:,} trained on" in counted
    domain = open_domain(
        "a", [tmp_path / "o_text_document"], seq_length=8, seed=0,
        labels=[tmp_path / "o_label_document"],
    )  # fmt: skip
    assert domain.masks
    for bad, message in (("x,1", "token ids with commas"), ("-3", "token ids")):
        given = [*common, f"--mask-before-token={bad}", "--output-prefix", tmp_path / "p"]
        assert message in tool(preprocess_data_with_mask, *given, code=2)
    tool(preprocess_data_with_mask, *common, "--output-prefix", tmp_path / "q")
    assert not (tmp_path / "q_label_document.idx").exists()


def test_tokens_are_counted(tool: Tool, tmp_path: Path, tokenizer_file: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "some text " * 9}] * 3)
    for name in ("a", "b"):
        tool(
            preprocess_data_with_mask, "--input", source, "--tokenizer-type", "HFTokenizer",
            "--vocab-file", tokenizer_file, "--output-prefix", tmp_path / name,
        )  # fmt: skip
    paths = [tmp_path / f"{name}_text_document" for name in ("a", "b")]
    total = sum(len(document) for path in paths for document in documents(str(path)))
    said = tool(dataset_token_count, paths[0], f"{paths[1]}.bin")
    assert f"total: {total:,} tokens" in said
    assert "no such file" in tool(dataset_token_count, tmp_path / "c", code=2)


def test_labels_of_a_folder_are_joined_in_the_order_of_the_tokens(
    tool: Tool, tmp_path: Path, tokenizer_file: str
) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    for number, name in enumerate(["b", "a", "a_b", "c"]):
        source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"Q{i}: A {name}"} for i in range(3)])
        tool(
            preprocess_data_with_mask, "--input", source, "--tokenizer-type", "HFTokenizer",
            "--vocab-file", tokenizer_file, "--mask-before-token", number,
            "--output-prefix", folder / name,
        )  # fmt: skip
    tool(merge_datasets, "--input", folder, "--output-prefix", tmp_path / "t")
    tool(merge_datasets, "--input", folder, "--labels", "--output-prefix", tmp_path / "l")
    tokens, labels = documents(str(tmp_path / "t")), documents(str(tmp_path / "l"))
    assert len(tokens) == 12
    for own, text in zip(labels, tokens, strict=True):
        assert all(label in (-100, token) for label, token in zip(own, text, strict=True))
    for stray in folder.glob("*label*"):
        stray.unlink()
    assert "no dataset of labels" in tool(
        merge_datasets, "--input", folder, "--labels", "--output-prefix", tmp_path / "n", code=2
    )


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: str) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "bare")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    tokenizer.chat_template = "{{ messages|length }}" + TEMPLATE
    tokenizer.save_pretrained(folder / "anew")
    return folder


def conversation(turns: int) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * turns
    found = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(roles)]
    return [{"role": "system", "content": "be brief"}, *found]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = [
        {"conversation": conversation(1 + i % 3), "score": i, "good": i % 2 == 0} for i in range(9)
    ]
    return write_jsonl(tmp_path / "chats.jsonl", lines)


def written(prefix: Path, kind: str) -> list[list[int]]:
    name = {"text": "", "label": "_label", "reward": "_reward"}[kind]
    return documents(f"{prefix}_conversation{name}_document")


def test_only_answers_are_trained_on(
    tool: Tool, chats: Path, chat_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder / "chat")
    common = ["--input", chats, "--tokenizer-path", chat_folder / "chat"]
    tool(preprocess_data_with_chat_template, *common, "--output-prefix", tmp_path / "o")
    tokens, labels = written(tmp_path / "o", "text"), written(tmp_path / "o", "label")
    for number, (text, own) in enumerate(zip(tokens, labels, strict=True)):
        turns = conversation(1 + number % 3)
        whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert text == [*whole, tokenizer.eos_token_id]
        assert all(label in (token, -100) for token, label in zip(text, own, strict=True))
        answers = "".join(f"{t['content']}\n" for t in turns if t["role"] == "assistant")
        assert tokenizer.decode([t for t in own if t >= 0]) == f"{answers}<|endoftext|>"
    sidecar = read_sidecar(f"{tmp_path}/o_conversation_document")
    assert sidecar is not None
    assert (sidecar.vocab_size, sidecar.eod_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert "exists" in tool(
        preprocess_data_with_chat_template, *common, "--output-prefix", tmp_path / "o", code=2
    )


def test_each_flag_does_what_it_says(
    tool: Tool, chats: Path, chat_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder / "chat")

    def run(name: str, *flags: object) -> list[list[int]]:
        tool(
            preprocess_data_with_chat_template, "--input", chats, "--tokenizer-path",
            chat_folder / "chat", "--output-prefix", tmp_path / name, *flags,
        )  # fmt: skip
        path = f"{tmp_path / name}_conversation_label_document.idx"
        return written(tmp_path / name, "label") if Path(path).exists() else []

    for number, own in enumerate(run("last", "--only-last")):
        answer = conversation(1 + number % 3)[-1]["content"]
        assert tokenizer.decode([t for t in own if t >= 0]) == f"{answer}\n<|endoftext|>"
    users = run("user", "--generation-role", "user")
    assert tokenizer.decode([t for t in users[0] if t >= 0]).startswith("<|user|>user says 0")
    assert "user says 0" in tokenizer.decode([t for t in users[0] if t >= 0])
    assert run("all", "--no-mask") == []
    rewarded = run("rm", "--for-rm", "--reward-key", "score")
    end = tokenizer.eos_token_id
    for own, text in zip(rewarded, written(tmp_path / "rm", "text"), strict=True):
        assert text[-2:] == [end, end]
        assert own == [-100] * (len(text) - 1) + [end]
    assert written(tmp_path / "rm", "reward") == [[i] for i in range(9)]
    run("binary", "--reward-key", "good", "--binary-reward")
    assert written(tmp_path / "binary", "reward") == [[1 if i % 2 == 0 else -1] for i in range(9)]


@pytest.mark.slow
def test_several_processes_write_the_same(
    tool: Tool, chats: Path, chat_folder: Path, tmp_path: Path
) -> None:
    for workers in (1, 2):
        tool(
            preprocess_data_with_chat_template, "--input", chats, "--tokenizer-path",
            chat_folder / "chat", "--output-prefix", tmp_path / str(workers), "--workers", workers,
        )  # fmt: skip
    for kind in ("text", "label"):
        assert written(tmp_path / "1", kind) == written(tmp_path / "2", kind)


def test_what_cannot_be_used_is_named(tool: Tool, chat_folder: Path, tmp_path: Path) -> None:
    good = json.dumps({"conversation": conversation(1), "score": 0.5})

    def refused(line: str, *flags: object, folder: str = "chat") -> str:
        source = tmp_path / "bad.jsonl"
        source.write_text(f"{good}\n{line}\n")
        return tool(
            preprocess_data_with_chat_template, "--input", source, "--tokenizer-path",
            chat_folder / folder, "--output-prefix", tmp_path / "bad", *flags, code=2,
        )  # fmt: skip

    assert "bad.jsonl, line 2: no JSON" in refused("{")
    assert "there is no key 'conversation' (there are text)" in refused('{"text": "x"}')
    assert "should be a list of turns" in refused('{"conversation": ["hello"]}')
    assert "stored as whole numbers" in refused(good, "--reward-key", "score")
    assert "no key 'none'" in refused(good, "--reward-key", "none")
    assert "has no chat template" in refused(good, folder="bare")
    assert "writes earlier turns anew" in refused(good, folder="anew")
    assert "no Hugging Face tokenizer" in refused(good, folder="missing")
    assert "one of the two" in refused(good, "--for-rm", "--no-mask")
    assert "--binary-reward needs" in refused(good, "--binary-reward")
    assert not (tmp_path / "bad_conversation_document.idx").exists()
