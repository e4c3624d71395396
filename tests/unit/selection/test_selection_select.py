"""Choosing by the command: records as they were, a domain that can be trained on, and the bill."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.selection import Tool, chat, read_lines, run_tool, texts, write_lines

import deepy
from megatron.data.domain import open_domain
from megatron.data.ingest import pipeline
from megatron.data.reader import TokenReader
from megatron.data.sidecar import read_sidecar
from megatron.data.writer import TokenWriter
from megatron.model.accounting import flops_per_token
from megatron.selection import outputs, written
from megatron.selection.table import METADATA_KEY, ScoreTable
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.train import train_byte_level_bpe

BYTES = ["--tokenizer-type", "CharLevelTokenizer"]


@pytest.fixture
def tool(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    monkeypatch.chdir(tmp_path)
    return run_tool(capsys)


def scored(tool: Tool, *train: object, out: str = "s.parquet", more: Any = ()) -> dict[str, Any]:
    """Score by ``random``; return the table's columns."""
    tool("score", "--method", "random", "--train", *train, "--out", out, *more)
    return pq.read_table(out).to_pydict()


def documents(prefix: str) -> list[list[int]]:
    with TokenReader(prefix) as reader:
        starts = [reader.document_start(i) for i in range(reader.num_documents + 1)]
        return [reader.read(*pair).tolist() for pair in itertools.pairwise(starts)]


def fragment(path: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the one domain of a fragment, its block, and the other keys."""
    content = yaml.safe_load(Path(path).read_text())
    ((name, block),) = content.pop("domains").items()
    return name, block, content


def test_records_are_as_they_were_and_in_the_order_of_the_choice(tool: Tool) -> None:
    records = [{"id": f"d{n}", "text": f"text {n} é", "extra": [n, None]} for n in range(40)]
    records[3] |= {"score": 7}
    write_lines(Path("a.jsonl"), records[:30])
    columns = {key: [record[key] for record in records[30:]] for key in ("id", "text", "extra")}
    pq.write_table(pa.table(columns), "b.parquet")
    table = scored(tool, "a.jsonl", "b.parquet", more=BYTES)
    shown = tool("select", "--scores", "s.parquet", "--share", 1, "--out", "out", *BYTES)
    assert "40 of 40 documents by random, order top" in shown
    name = "any-train-p1.0-random-seed0"
    found = read_lines(Path(f"out/{name}.jsonl"))
    order = np.argsort(-np.array(table["score"]), kind="stable").tolist()
    for place, record in zip(order, found, strict=True):
        score = table["score"][place]
        own = {"selection_score": score} if place == 3 else {"score": score}
        assert record == {**records[place], **own}
    tokenizer = build_tokenizer("CharLevelTokenizer")
    expected = [[*tokenizer.encode(f"text {n} é"), tokenizer.eod] for n in order]
    domain, block, rest = fragment(f"out/{name}.yml")
    assert (domain, rest) == ("any-random", {"tokenizer_type": "CharLevelTokenizer"})
    assert block == {"train": f"out/{name}_text_document"}
    assert documents(block["train"]) == expected
    assert [len(one) for one in expected] == [table["tokens"][n] for n in order]
    sidecar = read_sidecar(block["train"])
    assert sidecar is not None
    assert sidecar.tokenizer["sha256"] == tokenizer.sha256


def test_without_a_tokenizer_there_are_records_alone(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(9))
    scored(tool, "a.jsonl")
    shown = tool("select", "--scores", "s.parquet", "--documents", 4, "--out", "out")
    assert "no tokenizer is named, so no domain is made" in shown
    assert sorted(path.suffix for path in Path("out").glob("any*")) == [".json", ".jsonl"]
    (found,) = Path("out").glob("*.jsonl")
    assert found.name == "any-train-p0.444444-random-seed0.jsonl"
    assert all(one["id"] == f"a:{one['text'].split()[0][4:]}" for one in read_lines(found))


def test_conversations_are_trained_on_where_the_assistant_speaks(tool: Tool) -> None:
    pair = {"prompt": "what?", "completion": "that"}
    write_lines(Path("c.jsonl"), [chat("asked", "said"), pair, {"text": "plain"}])
    table = scored(tool, "c.jsonl", more=BYTES)
    tool("select", "--scores", "s.parquet", "--share", 1, "--out", "out", "--name", "x y", *BYTES)
    _, block, _ = fragment("out/x-y.yml")
    tokenizer = build_tokenizer("CharLevelTokenizer")
    prompts, answers = ("asked\n", "what?\n", ""), ("said", "that", "plain")
    order = np.argsort(-np.array(table["score"])).tolist()
    tokens = [[*tokenizer.encode(prompts[n] + answers[n]), tokenizer.eod] for n in order]
    labels = [
        [-100] * len(prompts[n]) + [*tokenizer.encode(answers[n]), tokenizer.eod] for n in order
    ]
    assert documents(block["train"]) == tokens
    assert documents(block["train_labels"]) == labels
    assert [len(one) for one in tokens] == [table["tokens"][n] for n in order]
    domain = open_domain(
        "x", [block["train"]], labels=[block["train_labels"]], seq_length=4, seed=0
    )
    assert domain.masks
    domain.close()


def test_conversations_without_any_answer_make_no_domain(tool: Tool) -> None:
    asked = {"messages": [{"role": "user", "content": "asked"}]}
    write_lines(Path("c.jsonl"), [asked] * 3)
    scored(tool, "c.jsonl")
    words = ["select", "--scores", "s.parquet", "--share", 1, "--out", "out"]
    for _ in range(2):
        problem = tool(*words, *BYTES, code=2)
        assert "none of the chosen conversations has an answer" in problem
        assert not list(Path("out").glob("*.bin")) + list(Path("out").glob("*.yml"))
    tool(*words, "--name", "records")
    assert len(read_lines(Path("out/records.jsonl"))) == 3


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    folder.mkdir()
    words = iter(["user assistant said asked"] * 9)
    train_byte_level_bpe(words, str(folder / "tokenizer.json"), vocab_size=300)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_chat_template_is_used_as_by_the_tool_for_conversations(
    tool: Tool, chat_model: Path, workers: int
) -> None:
    from tools import preprocess_data_with_chat_template as reference

    write_lines(Path("c.jsonl"), [chat(f"asked {n}", "said " * n) for n in range(1, 60)])
    chosen = ["--tokenizer-path", chat_model]
    table = scored(tool, "c.jsonl", more=chosen)
    words = ["--share", 1, "--out", "out", "--name", "x", "--workers", workers]
    tool("select", "--scores", "s.parquet", *words, *chosen)
    _, block, rest = fragment("out/x.yml")
    assert rest == {}
    given = ["--jsonl-keys", "messages", "--output-prefix", "ref", *map(str, chosen)]
    reference.main(["--input", "out/x.jsonl", *given])
    for ours, theirs in (("train", ""), ("train_labels", "_label")):
        assert documents(block[ours]) == documents(f"ref_messages{theirs}_document")
    mine, other = read_sidecar(block["train"]), read_sidecar("ref_messages_document")
    assert mine is not None
    assert mine == other or (mine.tokenizer, mine.tokens) == (other.tokenizer, other.tokens)
    sizes = sorted(len(one) for one in documents(block["train"]))
    assert sizes == sorted(table["tokens"])


def test_tokenised_data_is_copied_with_its_labels(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), [{"text": f"number {n} " * 4} for n in range(50)])
    scored(tool, "a.jsonl")
    tool("select", "--scores", "s.parquet", "--share", 1, "--out", "o", "--name", "x", *BYTES)
    prefix = "o/x_text_document"
    with TokenReader(prefix) as reader, TokenWriter("labels", "int32") as out:
        for number, size in enumerate(reader.document_sizes(0, 50).tolist()):
            out.add([-100] * (size - 2) + [number, number])
    config = {
        **TINY,
        "split": "1,0,0",
        "tokenizer_type": "CharLevelTokenizer",
        "domains": {"web": {"train": prefix, "train_labels": "labels"}},
    }
    Path("c.yml").write_text(yaml.safe_dump(config))
    table = scored(tool, "web", out="t.parquet", more=["--config", "c.yml"])
    sizes = [len(one) for one in documents(prefix)]
    assert table["tokens"] == sizes
    tool("select", "--scores", "t.parquet", "--documents", 20, "--out", "p", "--name", "y",
         "--config", "c.yml", "--domain", "best/web")  # fmt: skip
    name, block, _ = fragment("p/y.yml")
    assert name == "best/web"
    order = np.argsort(-np.array(table["score"])).tolist()[:20]
    assert documents(block["train"]) == [documents(prefix)[n] for n in order]
    assert [one[-1] for one in documents(block["train_labels"])] == order
    assert [one["id"] for one in read_lines(Path("p/y.jsonl"))] == [f"web:{n}" for n in order]
    before, after = read_sidecar(prefix), read_sidecar(block["train"])
    assert before is not None
    assert after is not None
    assert (after.tokenizer, after.eod_id) == (before.tokenizer, before.eod_id)
    assert after.bytes == sum(len(one["text"]) for one in read_lines(Path("p/y.jsonl")))
    # Tokenised data alone, and no configuration: nothing has to be named at all.
    scored(tool, prefix, out="u.parquet")
    tool("select", "--scores", "u.parquet", "--tokens", "1K", "--out", "q", "--name", "z")
    assert sum(map(len, documents("q/z_token_document"))) <= 1000


def test_data_that_was_not_tokenised_alike_is_refused(tool: Tool) -> None:
    for name, dtype in (("a", "uint16"), ("b", "int32")):
        with TokenWriter(name, dtype) as out:
            out.add([3, 4, 5])
    scored(tool, "a", "b", more=BYTES)
    words = ["select", "--scores", "s.parquet", "--share", 1, "--out", "o", *BYTES]
    assert "were not tokenised alike, and cannot become one domain" in tool(*words, code=2)
    assert "a: tokens, whose text is read by the tokenizer" in tool(*words[:-2], code=2)


TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "train_iters": 5,
    "train_micro_batch_size_per_gpu": 2,
    "num_gpus": 1,
    "run_dir": "run",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


def test_a_fragment_passes_the_check_of_a_run(
    tool: Tool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    records = [chat(f"what is {n} and {n * 7}?", f"it is {n * n}" * 5) for n in range(300)]
    write_lines(Path("a.jsonl"), records)
    scored(tool, "a.jsonl")
    tool("select", "--scores", "s.parquet", "--share", 0.5, "--out", "o", "--name", "x", *BYTES)
    Path("model.yml").write_text(yaml.safe_dump(TINY))
    code = deepy.main(["--check", "train.py", "model.yml", "o/x.yml"])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    assert "check: everything the run needs is there" in shown.out


def test_flops_are_those_of_the_model_and_scoring_is_charged(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), [{"text": "x" * 99} for _ in range(500)])
    scored(tool, "a.jsonl", more=BYTES)
    tool("select", "--scores", "s.parquet", "--share", 1, "--out", "o", "--name", "x", *BYTES)
    Path("model.yml").write_text(yaml.safe_dump(TINY))
    spent = 3e7
    table = pq.read_table("s.parquet")
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    facts["cost"] = {"flops": spent, "tokens": 77}
    charged = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
    pq.write_table(charged, "s.parquet")
    from megatron.config import load_config
    from megatron.training.plan.command import with_vocabulary

    price = flops_per_token(with_vocabulary(load_config(["model.yml", "o/x.yml"])).model)
    for epochs in (1, 3):
        budget = spent + 20.5 * 100 * price * epochs
        words = ["--flops", budget, "--epochs", epochs, "--out", f"p{epochs}", "--name", "y"]
        shown = tool("select", "--scores", "s.parquet", *words, "--config", "model.yml", "o/x.yml")
        assert "20 of 500 documents" in shown
        assert f"scoring   {spent:>12.4g} FLOPs" in shown
        assert "77 tokens read by models" in shown
        assert f"{2000 * price * epochs:>12.4g} FLOPs" in shown
        assert documents(f"p{epochs}/y_text_document") == documents("o/x_text_document")[:20]
    sized = tool("select", "--scores", "s.parquet", "--flops", 3e8, "--model-size", "1K",
                 "--out", "q", "--dry-run")  # fmt: skip
    assert f"{int((3e8 - spent) / 6e3 // 100)} of 500 documents" in sized
    assert not Path("q").exists()
    for words, problem in (
        (["--flops", 1e9], "say what will be trained"),
        (["--flops", 1e7, "--model-size", "1K"], "leaves nothing to train with: scoring has cost"),
        (["--share", 0.5, "--model-size", "1K"], "--model-size 1K: it belongs to --flops"),
        (["--share", 0.5, "--epochs", 2], "--epochs 2.0: it belongs to --flops"),
        (["--flops", "many", "--model-size", "1K"], "--flops is 'many'"),
        (["--share", 2], "--share 2: above 0 and at most 1"),
        (["--share", 0.5, "--tokens", 3], "not allowed with argument"),
        ([], "one of the arguments --share --documents --tokens --flops is required"),
    ):
        assert problem in tool("select", "--scores", "s.parquet", *words, "--out", "z", code=2)


def test_tokens_are_counted_when_they_are_asked_for(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(60))
    scored(tool, "a.jsonl")
    words = ["select", "--scores", "s.parquet", "--tokens", 200, "--out", "o", "--name", "x"]
    assert "give --tokenizer-type and --vocab-file" in tool(*words, code=2)
    tool(*words, *BYTES)
    assert 150 < sum(map(len, documents("o/x_text_document"))) <= 200
    # Those of another tokenizer are counted anew.
    train_byte_level_bpe(iter(["word1 word2 word3 "] * 20), "bpe.json", vocab_size=300)
    other = ["--tokenizer-type", "HFTokenizer", "--vocab-file", "bpe.json"]
    scored(tool, "a.jsonl", out="t.parquet", more=BYTES)
    tool("select", "--scores", "t.parquet", *words[3:-1], "y", *other)
    assert 190 < sum(map(len, documents("o/y_text_document"))) <= 200


def test_the_flags_of_a_ranking_decide(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(100))
    write_lines(Path("b.jsonl"), texts(20))
    scored(tool, "a.jsonl", "b.jsonl")
    seen = set()
    for number, words in enumerate(
        (
            [],
            ["--order", "low"],
            ["--order", "mid"],
            ["--order", "mid", "--seed", 1],
            ["--order", "mid", "--thirds-of", "kept"],
            ["--order", "sample"],
            ["--order", "sample", "--seed", 1],
            ["--order", "sample", "--temperature", 9],
            ["--per-source", "share"],
            ["--per-source", "equal"],
        )
    ):
        name = f"n{number}"
        tool("select", "--scores", "s.parquet", "--documents", 30, "--out", "o", "--name", name,
             *words)  # fmt: skip
        chosen = tuple(one["id"] for one in read_lines(Path(f"o/{name}.jsonl")))
        assert len(set(chosen)) == 30
        assert chosen not in seen
        seen.add(chosen)
        if words == ["--per-source", "equal"]:
            assert sum(one.startswith("b") for one in chosen) == 15
    tool("select", "--scores", "s.parquet", "--share", 1, "--out", "p", "--task", "exam/1",
         "--order", "mid", "--seed", 7)  # fmt: skip
    assert Path("p/exam-1-train-p1.0-random-seed0-mid-seed7.jsonl").exists()
    for words, whose in (
        (["--temperature", 3], "--order sample"),
        (["--order", "sample", "--thirds-of", "kept"], "--order low and mid"),
        (["--epoch", 3], "choices by ppl"),
        (["--epochs", 2], "--flops"),
    ):
        problem = tool("select", "--scores", "s.parquet", "--share", 1, "--out", "q", *words,
                       code=2)  # fmt: skip
        assert whose in problem


def test_the_corpus_must_be_the_one_that_was_scored(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(30))
    scored(tool, "a.jsonl")
    words = ["select", "--scores", "s.parquet", "--share", 0.5, "--out", "o"]
    Path("moved").mkdir()
    shutil.move("a.jsonl", "moved/a.jsonl")
    problem = tool(*words, code=2)
    assert "a.jsonl: no such file" in problem
    assert "say where with --train (domains of a configuration: name it by --config)" in problem
    shutil.rmtree("s.parquet.work")  # nor does it need what the scoring left behind
    tool(*words, "--train", "moved/a.jsonl")
    write_lines(Path("moved/a.jsonl"), texts(31))
    problem = tool(*words, "--train", "moved/a.jsonl", code=2)
    assert "'a' has changed since it was scored (it had 30 documents, and has 31)" in problem
    write_lines(Path("b.jsonl"), texts(30))
    assert "'b' was not scored" in tool(*words, "--train", "b.jsonl", code=2)
    assert "no such table" in tool("select", "--scores", "x.parquet", "--share", 1, "--out", "o",
                                   code=2)  # fmt: skip


def flipped(path: Path) -> bytes:
    """Return a table's bytes with some of its scores' turned over."""
    content = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    start = group.column(group.num_columns - 1).data_page_offset
    for place in range(start + 100, start + 130):
        content[place] ^= 0x5A
    return bytes(content)


@pytest.mark.parametrize("change", ["bits", "rows", "order", "column", "kind"])
def test_a_table_that_was_changed_is_told(tool: Tool, change: str) -> None:
    write_lines(Path("a.jsonl"), texts(90))
    scored(tool, "a.jsonl")
    whole, path = pq.read_table("s.parquet"), Path("s.parquet")
    place = whole.column_names.index("score")
    changed = {
        "rows": whole.slice(0, 80),
        "order": whole.take(list(range(89, -1, -1))),
        "column": whole.drop_columns(["score"]),
        "kind": whole.set_column(place, "score", pa.array(["high"] * 90)),
    }
    if change == "bits":
        path.write_bytes(flipped(path))
    else:
        pq.write_table(changed[change], path)
    problem = tool("select", "--scores", path, "--share", 0.5, "--out", "o", code=2)
    assert "s.parquet: damaged or changed since it was made" in problem
    assert not Path("o").exists()


def test_a_choice_is_not_written_over_and_not_made_twice(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(30))
    scored(tool, "a.jsonl")
    words = ["select", "--scores", "s.parquet", "--out", "o", "--name", "x", *BYTES]
    tool(*words, "--share", 0.5)
    before = {path.name: path.stat().st_mtime_ns for path in Path("o").glob("x*")}
    assert "already complete: nothing to do" in tool(*words, "--share", 0.5)
    assert {path.name: path.stat().st_mtime_ns for path in Path("o").glob("x*")} == before
    problem = tool(*words, "--share", 0.2, code=2)
    assert "holds another choice (documents was 15, is 6); give --overwrite" in problem
    tool(*words, "--share", 0.2, "--overwrite")
    assert len(read_lines(Path("o/x.jsonl"))) == len(documents("o/x_text_document")) == 6
    Path("o/y.jsonl").write_text("mine\n")
    assert "nothing says how it was made" in tool(
        *words[:-4], "--name", "y", *BYTES, "--share", 1, code=2
    )
    assert Path("o/y.jsonl").read_text() == "mine\n"


def test_a_choice_that_was_killed_goes_on(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(Path("a.jsonl"), texts(30))
    scored(tool, "a.jsonl")
    words = ["select", "--scores", "s.parquet", "--share", 0.5, "--name", "x", *BYTES, "--out"]
    tool(*words, "whole")
    places = [
        (written, "_in_order"),
        (outputs, "encode_texts"),
        (pipeline._Run, "_finish"),
        (outputs, "fragment_text"),
    ]
    for number, (where, what) in enumerate(places):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, killed)
            tool(*words, f"o{number}", code=130)
        tool(*words, f"o{number}")
        for path in Path("whole").glob("x*"):
            if path.suffix in (".jsonl", ".bin", ".idx"):
                assert Path(f"o{number}", path.name).read_bytes() == path.read_bytes()
        assert fragment(f"o{number}/x.yml")[0] == "any-random"


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_table_says_what_it_is(tool: Tool) -> None:
    write_lines(Path("a.jsonl"), texts(5))
    write_lines(Path("t.jsonl"), texts(2))
    tool("score", "--method", "bm25", "--train", "a.jsonl", "--target", "exam=t.jsonl", "--out",
         "s.parquet")  # fmt: skip
    facts = ScoreTable("s.parquet").facts
    assert (facts.method, facts.task, facts.subtasks) == ("bm25", "exam", ("exam",))
    tool("select", "--scores", "s.parquet", "--share", 1, "--out", "o")
    assert Path("o/exam-train-p1.0-bm25.jsonl").exists()
