"""The quickstart's texts: the same everywhere, without repeats, honestly split."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source import ROOT

from megatron.data.corpora import arithmetic, library, records, unicode_names
from megatron.data.corpora.documents import (
    Document,
    RepeatFilter,
    split_documents,
    take_bytes,
    write_jsonl,
)
from megatron.errors import DataError


def documents(count: int, size: int = 500) -> list[Document]:
    return [
        Document(text=f"{number:06d} " + "x" * (size - 7), source=str(number))
        for number in range(count)
    ]


def test_filter_drops_paragraphs_seen_before_whatever_their_spacing():
    shared = "a paragraph that two documents share, long enough to be taken for a repeat"
    first = Document(text=f"one\n\n{shared}\n\nend", source="a")
    second = Document(text=f"two\n\n{shared.replace(' ', '  ')}\n\nend", source="b")
    third = Document(text=shared, source="c")
    kept = list(RepeatFilter()([first, second, third]))
    assert [document.text for document in kept] == [f"one\n\n{shared}\n\nend\n", "two\n\nend\n"]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(700, 1500), st.integers(100, 900))
def test_splits_are_a_partition_of_the_documents(count, size):
    given_documents = documents(count, size)
    if sum(document.size for document in given_documents) < 4 * 72_000:
        with pytest.raises(DataError, match="too few"):
            split_documents(given_documents)
        return
    splits = split_documents(given_documents)
    names = [document.source for chosen in splits.values() for document in chosen]
    assert sorted(names) == sorted(document.source for document in given_documents)
    total = sum(document.size for document in given_documents)
    held = {name: sum(document.size for document in chosen) for name, chosen in splits.items()}
    assert held["valid"] >= max(48_000, 0.06 * total) - 1
    assert held["test"] >= max(24_000, 0.03 * total) - 1
    assert held["train"] > 2 * (held["valid"] + held["test"])


def test_a_split_does_not_depend_on_the_order_of_the_documents():
    given_documents = documents(900)
    forward, backward = split_documents(given_documents), split_documents(given_documents[::-1])
    assert {name: [d.source for d in chosen] for name, chosen in forward.items()} == {
        name: [d.source for d in chosen] for name, chosen in backward.items()
    }


def test_one_huge_document_trains():
    splits = split_documents([*documents(900), Document(text="y" * 200_000, source="huge")])
    assert "huge" in {document.source for document in splits["train"]}


def test_documents_too_large_for_a_split_are_refused():
    with pytest.raises(DataError, match="too large"):
        split_documents([Document(text=f"{n}" * 100_000, source=str(n)) for n in range(9)])


def test_taking_reads_no_further_than_needed():
    def endless():
        yield from documents(3, 100)
        raise AssertionError("read on")

    assert len(list(take_bytes(endless(), 300))) == 3


def test_jsonl_holds_what_was_written(tmp_path):
    path = tmp_path / "a" / "x.jsonl"
    write_jsonl(path, [Document(text="é\n\u2028", source="s")])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [
        {"text": "é\n\u2028", "meta": {"source": "s"}}
    ]
    assert not list(path.parent.glob("*.tmp"))


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.text(alphabet="ab<\n", max_size=9), max_size=6), st.integers(1, 5))
def test_cut_documents_put_together_are_the_file(parts, block):
    import tempfile
    from pathlib import Path
    from unittest.mock import patch

    from megatron.data.corpora import documents as module

    text = "<end>".join(parts)
    with tempfile.TemporaryDirectory() as folder, patch.object(module, "BLOCK", block):
        (Path(folder) / "a").write_text(text, newline="")
        target = module.cut_documents(Path(folder) / "a", Path(folder) / "a.jsonl", "<end>")
        found = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    assert "".join(found).rstrip() == text.rstrip()
    assert all(document.endswith("<end>") for document in found[:-1])
    assert all(document.count("<end>") <= 1 for document in found)


@pytest.fixture(scope="module")
def few_sources():
    files = [item for item in library.source_files() if item[0] in {"json/decoder.py", "heapq.py"}]
    assert len(files) == 2
    return files


def test_code_is_the_source_without_docstrings(few_sources, monkeypatch):
    monkeypatch.setattr(library, "source_files", lambda: few_sources)
    found = {document.source: document.text for document in library.code()}
    for name, text in found.items():
        tree = ast.parse(text)  # still Python
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        told = [node for node in ast.walk(tree) if isinstance(node, nodes)]
        assert not [node for node in told if ast.get_docstring(node)], name
    assert "def heappush(heap, item):" in found["heapq.py"]


def test_a_body_of_a_docstring_alone_stays_a_body(monkeypatch):
    source = (
        'class A:\n    """Only\n    this."""\n\nclass B: "one line"\n\n'
        'def f():\n    "x"\n    return 1\n'
    )
    monkeypatch.setattr(library, "source_files", lambda: [("a.py", source)])
    (document,) = library.code()
    compile(document.text, "a.py", "exec")
    assert "Only" not in document.text
    assert '"x"' not in document.text
    assert 'class B: "one line"' in document.text


def test_docstrings_stand_under_their_names(few_sources, monkeypatch):
    monkeypatch.setattr(library, "source_files", lambda: few_sources)
    text = "".join(document.text for document in library.docstrings())
    assert "heapq.heappush(heap, item)\n    Push item onto heap" in text
    assert "class json.decoder.JSONDecoder" in text
    assert "math.gcd" in text or "builtins.sorted" in text  # modules without source


def test_manual_has_topics_and_module_texts():
    sources = [document.source for document in library.manual()]
    assert any(source.startswith("topic ") for source in sources)
    assert any(source.startswith("module ") for source in sources)
    assert len(sources) > 100


def test_a_python_without_topics_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data\.topics"):
        list(library.manual())


def test_a_python_without_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="standard library"):
        list(library.code())


def test_unicode_lines():
    text = "".join(document.text for document in unicode_names.characters())
    assert (
        "U+00E9 é LATIN SMALL LETTER E WITH ACUTE; category Ll; decomposes to U+0065 U+0301; "
        "upper case U+00C9\n"
    ) in text
    assert "\nU+4E00 " not in text


def test_arithmetic_is_right():
    checked = 0
    for document in arithmetic.exercises(size=40_000):
        for line in document.text.splitlines()[1:]:
            for equation in line.replace(". ", ", ").replace(": ", ", ").split(", "):
                left, equals, right = equation.rstrip(".").partition(" = ")
                if equals and set(left + right) <= set("0123456789+-* ="):
                    sides = [eval(side) for side in (left, *right.split(" = "))]
                    assert len(set(sides)) == 1, line
                    checked += 1
    assert checked > 500


def test_record_totals_agree():
    orders = 0
    for document in records.files(size=60_000):
        if not document.text.startswith("{"):
            continue
        decoder, place, text = json.JSONDecoder(), 0, document.text.strip()
        while place < len(text):
            order, end = decoder.raw_decode(text, place)
            place = end + 1
            total = sum(
                item["quantity"] * round(float(item["price"]) * 100) for item in order["items"]
            )
            assert total == round(float(order["total"]) * 100)
            orders += 1
    assert orders > 10


@pytest.mark.parametrize("make", [arithmetic.exercises, records.files])
def test_generated_documents_do_not_depend_on_how_many_are_asked_for(make):
    short, long = list(make(size=5_000)), list(make(size=20_000))
    assert long[: len(short)] == short
    assert list(make(size=5_000, seed=2)) != short


CODE = """
import hashlib, itertools
from megatron.data.corpora import arithmetic, library, records, unicode_names
digest = hashlib.sha256()
library_files = library.source_files()[:12]
library.source_files = lambda: library_files
for make in (library.code, library.docstrings, library.bytecode, unicode_names.characters,
             lambda: arithmetic.exercises(size=9000), lambda: records.files(size=9000)):
    for document in itertools.islice(make(), 60):
        digest.update(document.text.encode() + document.source.encode())
print(digest.hexdigest())
"""


def test_texts_are_the_same_in_every_process():
    """Neither the order of sets nor an address in memory shows in a text."""
    seen = {
        subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop().strip()) == len(hashlib.sha256().hexdigest())
