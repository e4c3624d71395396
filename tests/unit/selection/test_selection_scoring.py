"""Scoring: the same table for any number of shards and after any kill, and nothing mixed up."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.selection import Lengths, chat, run_tool, texts, write_lines

from megatron.data.shards import Shard, parse_shard
from megatron.errors import ConfigError, DataError, NeomixError, RunError
from megatron.selection import chunk_scoring, merging
from megatron.selection.base import Cost
from megatron.selection.driver import score
from megatron.selection.inputs import Inputs
from megatron.selection.merging import merge
from megatron.selection.random_order import Random
from megatron.selection.settings import ScoreRequest
from megatron.selection.table import METADATA_KEY, ScoreTable, aggregate
from megatron.selection.targets import open_targets
from megatron.selection.token_counts import PlainEncoder
from megatron.tokenizer import build_tokenizer


@pytest.fixture
def request_of(tmp_path: Path) -> Any:
    """Return a function that makes a request for 205 documents in chunks of 10."""
    records = [*texts(100), {"text": ""}, *[chat(f"q{n}", "yes " * n) for n in range(104)]]
    train = write_lines(tmp_path / "train.jsonl", records)
    exam = [{"text": "x" * n, "subtask": f"s{n}"} for n in (3, 1)]
    write_lines(tmp_path / "exam.jsonl", exam)

    def make(out: str, **changes: Any) -> ScoreRequest:
        request = ScoreRequest(
            selector=Lengths(),  # type: ignore[arg-type]
            inputs=Inputs(words=(str(train),)),
            targets=open_targets([f"exam={tmp_path / 'exam.jsonl'}"]),
            out=tmp_path / out,
            encoder=PlainEncoder(tokenizer=build_tokenizer("CharLevelTokenizer")),
            chunk_documents=10,
        )
        return replace(request, **changes)

    return make


def test_the_table_has_what_was_scored(request_of: Any, tmp_path: Path) -> None:
    done = score(request_of("s.parquet"))
    assert done.scored == 205
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert list(rows[0]) == [
        *("id", "source", "number", "tokens", "words", "score:s3", "score:s1", "score")
    ]
    assert rows[12] == {
        "id": "train:12",
        "source": "train",
        "number": 12,
        "tokens": len("word12 " * 3) + 1,
        "words": 3,
        "score:s3": 24.0,
        "score:s1": 22.0,
        "score": 24.0,
    }
    assert rows[100]["tokens"] == 0
    assert np.isnan(rows[100]["score"])
    assert rows[103]["tokens"] == len("q2\nyes yes ") + 1
    facts = ScoreTable(tmp_path / "s.parquet").facts
    assert facts == done.table
    assert (facts.method, facts.aggregate, facts.task) == ("lengths", "max", "exam")
    assert facts.subtasks == ("s3", "s1")
    assert facts.parameters == {"scale": 1.0}
    assert facts.documents == 205
    assert facts.inputs["words"] == [str(tmp_path / "train.jsonl")]
    assert facts.cost.tokens == 215
    assert facts.cost.flops == pytest.approx(1020.5)


def test_any_number_of_shards_makes_the_same_bytes(request_of: Any, tmp_path: Path) -> None:
    score(request_of("whole.parquet"))
    whole = (tmp_path / "whole.parquet").read_bytes()
    for count in (2, 3, 30):
        out = f"of{count}.parquet"
        order = np.random.default_rng(count).permutation(count)
        selectors = []
        for index in order.tolist():
            request = request_of(out, shard=Shard(index=index, count=count))
            selectors.append(request.selector)
            done = score(request)
            assert done.table is None
        assert done.left == 0
        assert sum(one.prepared for one in selectors) == 1  # by whoever came first
        facts = merge(tmp_path / out)
        assert (tmp_path / out).read_bytes() == whole
        assert facts.cost == ScoreTable(tmp_path / "whole.parquet").facts.cost
        assert merge(tmp_path / out) == facts  # again


def test_a_killed_scoring_goes_on_where_it_was(request_of: Any, tmp_path: Path) -> None:
    score(request_of("whole.parquet"))
    out = "killed.parquet"
    batches = []
    for after in (0, 1, 4, 7):
        selector = Lengths(fail_after=after)
        with pytest.raises(KeyboardInterrupt):
            score(request_of(out, selector=selector))
        batches += selector.batches
    chunks = sorted((tmp_path / f"{out}.work" / "chunks").iterdir())
    assert len(chunks) == len(batches) == 12
    chunks[3].unlink()  # a shard of another machine that is not there yet, say
    with pytest.raises(DataError, match=r"10 of 21 chunks are not scored \(documents 30-40, 120-2"):
        merge(tmp_path / out)
    (tmp_path / f"{out}.work" / "chunks" / ".00000005.parquet.1.tmp").write_bytes(b"torn")
    (tmp_path / f".{out}.1.tmp").write_bytes(b"torn")  # of a table
    said: list[str] = []
    last = Lengths()
    assert score(request_of(out, selector=last), said.append).scored == 95
    assert said == ["continuing after 110 of 205 documents"]
    assert last.prepared == 0
    assert (tmp_path / out).read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / f"{out}.work" / "chunks").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_finished_table_is_left_alone(request_of: Any, tmp_path: Path) -> None:
    score(request_of("s.parquet"))
    before = (tmp_path / "s.parquet").stat().st_mtime_ns
    again = Lengths()
    assert score(request_of("s.parquet", selector=again)).scored == 0
    assert not again.batches
    assert (tmp_path / "s.parquet").stat().st_mtime_ns == before
    done = score(request_of("s.parquet", selector=again, overwrite=True))
    assert done.scored == 205
    assert again.prepared == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"selector": Lengths(scale=2.0)}, r"parameters\.scale was 1\.0, is 2\.0"),
        ({"selector": Lengths(aggregate="mean")}, r'aggregate was "max", is "mean"'),
        ({"encoder": None}, r"tokenizer was .*sha256.*, is null"),
        ({"chunk_documents": 11}, r"chunk_documents was 10, is 11"),
        ({"inputs": "longer"}, r"(corpus train\.)?documents was 205, is 3"),
        ({"targets": "other"}, r"(targets\.exam was null|subtasks 0 was ..?s3.)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_scoring_is_told_by_its_difference(
    request_of: Any, tmp_path: Path, change: dict[str, Any], problem: str, finished: bool
) -> None:
    if finished:
        score(request_of("s.parquet"))
    else:
        with pytest.raises(KeyboardInterrupt):
            score(request_of("s.parquet", selector=Lengths(fail_after=2)))
    if change.get("inputs"):
        (tmp_path / "new").mkdir()
        words = (str(write_lines(tmp_path / "new" / "train.jsonl", texts(3))),)
        change = {"inputs": Inputs(words=words)}
    if change.get("targets"):
        word = write_lines(tmp_path / "other.jsonl", texts(1))
        change = {"targets": open_targets([f"exam={word}", f"other={word}"])}
    with pytest.raises(DataError, match=rf"holds another scoring.*({problem}).*--overwrite"):
        score(request_of("s.parquet", **change))
    done = score(request_of("s.parquet", overwrite=True, **change))
    assert done.table is not None


def test_two_processes_do_not_score_the_same(request_of: Any, tmp_path: Path) -> None:
    work = tmp_path / "s.parquet.work"
    work.mkdir()
    (work / "use.lock").write_text("process 7 on there")
    with (work / "use.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"process 7 on there works on it"):
            score(request_of("s.parquet"))
        fcntl.flock(held, fcntl.LOCK_SH)  # what a shard holds
        score(request_of("s.parquet", shard=Shard(index=0, count=2)))
        with pytest.raises(RunError, match="works on it"):
            score(request_of("s.parquet"))
        with pytest.raises(RunError, match="works on it"):
            merge(tmp_path / "s.parquet")


def test_long_documents_are_handed_over_few_at_a_time(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_scoring, "_BATCH_CHARACTERS", 40)
    selector = Lengths()
    score(request_of("s.parquet", selector=selector))
    assert max(selector.batches) < 10
    assert len(selector.batches) > 40


def test_what_makes_no_sense_is_refused(request_of: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--method lengths compares .*; give --target"):
        score(request_of("s.parquet", targets=None))
    with pytest.raises(ConfigError, match="--overwrite would throw away what other shards"):
        score(request_of("s.parquet", overwrite=True, shard=Shard(index=0, count=2)))
    with pytest.raises(DataError, match=r"nothing was scored for it"):
        merge(tmp_path / "never.parquet")
    (tmp_path / "s.parquet").write_text("mine")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        score(request_of("s.parquet", overwrite=True))
    assert (tmp_path / "s.parquet").read_text() == "mine"
    with pytest.raises(NeomixError, match=r"s\.parquet.*cannot be written: Not a directory"):
        score(request_of("s.parquet/x.parquet"))


def test_a_damaged_table_or_chunk_is_told(request_of: Any, tmp_path: Path) -> None:
    score(request_of("s.parquet", shard=Shard(index=0, count=2)))
    score(request_of("s.parquet", shard=Shard(index=1, count=2)))
    chunk = tmp_path / "s.parquet.work" / "chunks" / "00000003.parquet"
    chunk.write_bytes(chunk.read_bytes()[:50])
    with pytest.raises(DataError, match=r"00000003\.parquet: damaged .*delete it and give"):
        merge(tmp_path / "s.parquet")
    chunk.unlink()
    score(request_of("s.parquet", shard=Shard(index=0, count=2)))
    sound = chunk.read_bytes()
    # Bits turned over in the first column, behind which the file's own index is sound.
    start = pq.read_metadata(chunk).row_group(0).column(0).data_page_offset
    chunk.write_bytes(sound[: start + 60] + bytes(20) + sound[start + 80 :])
    with pytest.raises(DataError, match=r"00000003\.parquet: damaged .*delete it and give"):
        merge(tmp_path / "s.parquet")
    chunk.write_bytes(sound)
    merge(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="not a table of scores"):
        ScoreTable(tmp_path / "bare.parquet")
    meta = json.loads(table.schema.metadata[METADATA_KEY])
    later = table.replace_schema_metadata({METADATA_KEY: json.dumps({**meta, "version": 9})})
    pq.write_table(later, tmp_path / "later.parquet")
    with pytest.raises(DataError, match="a table of version 9"):
        ScoreTable(tmp_path / "later.parquet")


def test_a_method_without_targets_takes_the_name_of_the_task(tmp_path: Path, capsys: Any) -> None:
    tool = run_tool(capsys)
    train = write_lines(tmp_path / "t.jsonl", texts(5))
    words = ["score", "--method", "random", "--train", train, "--out", tmp_path / "s.parquet"]
    assert "--target only names the task" in tool(*words, "--target", f"exam={train}")
    facts = ScoreTable(tmp_path / "s.parquet").facts
    assert (facts.task, facts.subtasks, facts.targets) == ("exam", (), {})


def test_row_groups_are_not_small(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_GROUP_ROWS", 45)
    score(request_of("s.parquet"))
    found = pq.ParquetFile(tmp_path / "s.parquet")
    sizes = [found.metadata.row_group(n).num_rows for n in range(found.num_row_groups)]
    assert sizes == [50, 50, 50, 50, 5]
    assert [len(rows) for rows in ScoreTable(tmp_path / "s.parquet").read()] == sizes
    assert found.read().column("number").to_pylist() == list(range(205))


def test_aggregates() -> None:
    scores = np.array([[1.0, 3.0], [np.nan, 2.0]])
    for how, expected in (("mean", 2.0), ("max", 3.0), ("none", 1.0)):
        found = aggregate(scores, how)
        assert found[0] == expected
        assert np.isnan(found[1])


def test_random_scores_are_even_and_belong_to_the_document(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "t.jsonl", texts(4000))
    found = {}
    for seed in (0, 1):
        out = tmp_path / f"{seed}.parquet"
        score(
            ScoreRequest(
                selector=Random(seed=seed),
                inputs=Inputs(words=(str(train),)),
                targets=None,
                out=out,
            )
        )
        table = ScoreTable(out)
        assert table.facts.subtasks == ()
        assert table.facts.cost == Cost()
        found[seed] = table.columns("score", "tokens")
    values = found[0]["score"]
    assert (found[0]["tokens"] == -1).all()
    assert values.min() >= 0
    assert values.max() < 1
    # Kolmogorov-Smirnov against even numbers, at 1 in a thousand.
    distance = np.abs(np.sort(values) - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.95 / np.sqrt(4000)
    assert abs(np.corrcoef(values, found[1]["score"])[0, 1]) < 0.06


@pytest.mark.parametrize("text", ["3", "2/2", "-1/2", "0/0", "a/b", "1/2/3"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--shard {text}"):
        parse_shard(text)


def test_shards_share_everything_out() -> None:
    for total in (0, 1, 7, 100):
        for count in (1, 2, 3, 9):
            parts = [parse_shard(f"{n}/{count}").range(total) for n in range(count)]
            assert [place for part in parts for place in part] == list(range(total))
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert parse_shard("slurm", {**array, "SLURM_ARRAY_TASK_MIN": "5"}) == Shard(index=2, count=4)
    step = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2"}
    assert parse_shard("slurm", {**array, **step}) == Shard(index=3, count=4)
    with pytest.raises(ConfigError, match="an array without gaps"):
        parse_shard("slurm", array)
    with pytest.raises(ConfigError, match="are not set; submit the command as a job array"):
        parse_shard("slurm", {})


def test_the_command_scores_shards_of_a_job_array_and_merges(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = run_tool(capsys)
    train = write_lines(tmp_path / "t.jsonl", texts(90))
    words = ["score", "--method", "random", "--train", train, "--chunk-documents", 8, "--seed", 5]
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    tool(*words, "--out", whole)
    for task in (2, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        shown = tool(*words, "--out", parts, "--shard", "slurm", "--work-dir", tmp_path / "w")
    assert "shard 0/2: 48 documents scored; all shards are done" in shown
    assert "merge --out" in shown
    assert "--shard slurm shares it out" in tool(*words, "--out", whole)
    assert "90 documents by random" in tool("merge", "--out", parts, "--work-dir", tmp_path / "w")
    assert parts.read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path / "w")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    tool = run_tool(capsys)
    train = write_lines(tmp_path / "t.jsonl", texts(3))
    out = ["--out", tmp_path / "s.parquet"]
    score_words = ["score", "--train", train, *out, "--method"]
    assert "did you mean 'bm25'?" in tool(*score_words, "bm52", code=2)
    assert "did you mean 'score'?" in tool("scoer", code=2)
    assert "unrecognized arguments: --ouput; did you mean '--out'?" in tool(
        *score_words, "random", "--ouput", "x", code=2
    )
    assert "--k1 belongs to --method bm25" in tool(*score_words, "random", "--k1", 2, code=2)
    assert "give it the ending .parquet" in tool(
        "score", "--train", train, "--method", "random", "--out", tmp_path / "s.pq", code=2
    )
    assert "belong to a --tokenizer-type" in tool(
        *score_words, "random", "--vocab-file", "x.json", code=2
    )
    assert "name its files by --config" in tool(*score_words, "random", "--set", "a=1", code=2)
    assert "--target nowhere.jsonl: no such file" in tool(
        *score_words, "bm25", "--target", "nowhere.jsonl", code=2
    )
    assert "is not a whole number from 1 on" in tool(
        *score_words, "random", "--chunk-documents", 0, code=2
    )
    for command in ("score", "merge", "select"):
        assert f"select_data.py {command}" in tool(command, "--help")
    for method in ("bm25", "embed", "ppl", "less", "random"):
        assert f"--method {method}: " in tool("score", "--help")
        assert f"--method {method}:" in tool("score", "--method", method, "--help")
    assert "usage: tools/select_data.py merge" in tool("--help")
    assert "usage: tools/select_data.py merge" in tool(code=2)
