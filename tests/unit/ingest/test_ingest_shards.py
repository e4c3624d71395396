"""Parts of a corpus tokenised by several machines, joined into what one run writes."""

from __future__ import annotations

import itertools
import json
import os
import random

import pytest
from ingest_files import FORMATS, sha, write_jsonl, written

from megatron.data.ingest import chunks
from megatron.data.ingest.chunks import read_chunks
from megatron.data.ingest.pipeline import PreprocessSettings, preprocess
from megatron.data.ingest.records import read_records
from megatron.data.ingest.shard_merging import merge_shards
from megatron.data.ingest.sources import find_sources
from megatron.data.shards import Shard, stretches
from megatron.errors import DataError, run_command
from tools import merge_datasets


def joined(capsys, *arguments, code=0):
    found = run_command(lambda: merge_datasets.main([str(one) for one in arguments]))
    out, err = capsys.readouterr()
    assert found == code, out + err
    return out + err


@pytest.mark.parametrize("name", [*FORMATS, "txt"])
def test_stretches_give_every_record_once_in_order(name, tmp_path, docs, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1500)
    (source,) = find_sources([str(written(tmp_path, name, docs))], text_documents="line")

    def texts(start, stretch=None):
        return [
            (chunk.stop, record.texts)
            for chunk in read_chunks(source, 0, start, ("text",), stretch)
            for record in read_records(chunk, ("text",))
        ]

    whole = [text for _, text in texts(0)]
    random_cuts = random.Random(1)
    for count in (1, 2, 3, 7, 200):
        cuts = sorted(random_cuts.randrange(source.size) for _ in range(count - 1))
        ends = itertools.pairwise([0, *cuts, source.size])
        parts = [texts(0, range(start, stop)) for start, stop in ends]
        assert [text for part in parts for _, text in part] == whole
    # And each goes on from where it was interrupted.
    for shard in range(3):
        (stretch,) = stretches(Shard(index=shard, count=3), [source.size])
        own = texts(0, stretch)
        for stop in {stop for stop, _ in own}:
            rest = [text for at, text in own if at > stop]
            assert [text for _, text in texts(stop, stretch)] == rest


def test_stretches_share_out_all_inputs():
    for sizes, count in (([5, 0, 7, 1], 3), ([1], 4), ([], 2), ([10, 10], 2), ([3, 100, 2], 7)):
        found = [stretches(Shard(index=index, count=count), sizes) for index in range(count)]
        for number, size in enumerate(sizes):
            assert [at for one in found for at in one[number]] == list(range(size))


@pytest.fixture
def inputs(tmp_path, docs):
    """Several files of several formats, and one that is a document by itself."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    third = len(docs) // 3
    write_jsonl(folder / "a.jsonl", [{"text": doc, "more": doc[:9]} for doc in docs[:third]])
    rest = [{"text": doc, "more": ""} for doc in docs[third : 2 * third]]
    (folder / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rest))
    write_jsonl(folder / "c.jsonl", [{"text": doc, "more": "x"} for doc in docs[2 * third :]])
    return folder


def settings(inputs, prefix, tokenizer_file, **changes):
    return PreprocessSettings(
        inputs=(str(inputs),),
        output_prefix=str(prefix),
        tokenizer_type="HFTokenizer",
        vocab_file=tokenizer_file,
        append_eod=True,
        keys=("text", "more"),
        **changes,
    )


@pytest.mark.parametrize("count", [3, 20])  # of 20 some are empty: a document spans several
def test_shards_joined_are_the_files_of_one_run(count, inputs, tmp_path, tokenizer_file):
    preprocess(settings(inputs, tmp_path / "one", tokenizer_file))
    order = random.Random(2).sample(range(count), count)
    for index in order:
        shard = Shard(index=index, count=count)
        preprocess(settings(inputs, tmp_path / "all", tokenizer_file, shard=shard))
    said = []
    merge_shards(str(tmp_path / "all"), said.append)
    for key in ("text", "more"):
        one, joined = (tmp_path / f"{name}_{key}_document" for name in ("one", "all"))
        assert sha(joined) == sha(one)
        assert (tmp_path / f"{joined.name}.meta.json").read_text() == (
            tmp_path / f"{one.name}.meta.json"
        ).read_text()
    # It is complete, for a second joining and for the command without --shard as well.
    before = os.stat(tmp_path / "all_text_document.bin")
    merge_shards(str(tmp_path / "all"), said.append)
    assert "already complete" in said[-1]
    assert preprocess(settings(inputs, tmp_path / "all", tokenizer_file)).already_done
    assert os.stat(tmp_path / "all_text_document.bin") == before


def test_by_the_commands_with_one_that_was_interrupted(
    preprocess, inputs, tmp_path, tokenizer_file, monkeypatch, capsys
):
    from megatron.data.ingest import pipeline

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 900)
    given = ("--input", inputs, "--append-eod", "--save-seconds", "0")
    preprocess(*given, "--output-prefix", tmp_path / "one")
    given = (*given, "--output-prefix", tmp_path / "all")
    preprocess(*given, "--shard", "1/2")
    assert "not finished: 0/2" in joined(capsys, "--shards", tmp_path / "all", code=2)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    original, calls = pipeline._Run._write, itertools.count()

    def failing(self, *arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(pipeline._Run, "_write", failing)
    preprocess(*given, "--shard", "slurm", code=130)
    assert "not finished: 0/2" in joined(capsys, "--shards", tmp_path / "all", code=2)
    assert "continuing an interrupted run" in preprocess(*given, "--shard", "slurm")
    joined(capsys, "--shards", tmp_path / "all")
    assert sha(tmp_path / "all_text_document") == sha(tmp_path / "one_text_document")
    assert "already complete" in preprocess(*given)


def test_shards_that_do_not_fit_are_refused(inputs, tmp_path, tokenizer_file):
    prefix = tmp_path / "all"
    with pytest.raises(DataError, match="none; run"):
        merge_shards(str(prefix))
    preprocess(settings(inputs, prefix, tokenizer_file, shard=Shard(index=0, count=2)))
    (inputs / "a.jsonl").write_text('{"text": "other", "more": "text"}\n')
    preprocess(settings(inputs, prefix, tokenizer_file, shard=Shard(index=1, count=2)))
    with pytest.raises(DataError, match=r"1/2 was made otherwise .*a.jsonl has changed"):
        merge_shards(str(prefix))
    with pytest.raises(DataError, match="with other settings"):
        preprocess(settings(inputs, prefix, tokenizer_file, shard=Shard(index=0, count=2)))
    redo = settings(inputs, prefix, tokenizer_file, shard=Shard(index=0, count=2), overwrite=True)
    preprocess(redo)
    (tmp_path / "all_text_document.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"all_text_document.idx exists; give --overwrite"):
        merge_shards(str(prefix))
    merge_shards(str(prefix), overwrite=True)
    preprocess(settings(inputs, prefix, tokenizer_file, shard=Shard(index=0, count=3)))
    with pytest.raises(DataError, match="shards of 2, 3 lie beside"):
        merge_shards(str(prefix))
