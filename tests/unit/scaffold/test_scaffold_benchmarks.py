"""Every benchmark starts as a script, and at its smallest writes results that can be shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.source import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.support import tool_tables

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
TINY_MODEL = "--layers 1 --hidden 32 --heads 2 --vocabulary 64"
SMALLEST = {
    "generate": f"{TINY_MODEL} --prompt 4 --new 3 --rows 2 --turns 1",
    "selection": "--documents 300 --part 100 --vocabulary 300 --turns 1",
}
SMALLEST_SLOW = {
    "checkpoint": "--megabytes 2 --turns 1",
    "loader": "--domains 2 --documents 40 --sequence 64 --rows 2 --batches 2 --turns 1",
    "memory": "--only grouped",
    "mixing": "--domains 2 --turns 3 --warmup 1",
    "output_loss": "--dtypes fp32 --tokens 32 --hidden 16 --vocabulary 64 --turns 1",
    "products": "--tokens 64 --hidden 64 --vocabulary 128 --turns 1",
    "startup": "--tokens 1e9 --document-tokens 1e6 --turns 1",
    "study_start": "--runs 2 --steps 3 --turns 1",
    "tokenize": "--megabytes 0.2 --vocab-size 400 --workers 1 --turns 1",
    "train": "--layers 1 --hidden 32 --heads 2 --vocabulary 128 --sequence 16 --batch 1 --turns 1 "
    "--no-compile",
}
TABLES = {
    "memory": (tool_tables.memory,),
    "selection": (tool_tables.selection,),
    "startup": (tool_tables.startup, tool_tables.opening),
    "study_start": (tool_tables.study_start,),
    "tokenize": (tool_tables.tokenize,),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_benchmark_says_how_it_is_called(script):
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *SMALLEST.items(),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in SMALLEST_SLOW.items()),
    ],
)
def test_a_benchmark_writes_results_that_can_be_shown(name, options, tmp_path):
    environment = {**os.environ, "BENCHMARK_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options.split()],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert content["benchmark"] == name
    assert content["command"].startswith(f"python benchmarks/{name}.py")
    assert {"date", "processor", "packages", "load"} <= set(content["machine"])
    for table in TABLES.get(name, ()):
        shown = table(tmp_path)
        assert shown.count("\n| ") >= 1
        assert f"`{content['command']}`" in shown


def test_the_benchmarks_stop_at_the_first_that_fails(tmp_path):
    """``make bench`` fails where a script does, and makes no documents then."""
    benchmarks, tools = tmp_path / "benchmarks", tmp_path / "tools"
    benchmarks.mkdir()
    tools.mkdir()
    (benchmarks / "a.py").write_text("print('a ran')")
    (benchmarks / "b.py").write_text("raise SystemExit('b is broken')")
    (benchmarks / "c.py").write_text("print('c ran')")
    (tools / "generate_docs.py").write_text("print('documents made')")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    command = ["make", "bench", "--assume-old=venv/.stamp-dev", "VENV=venv"]
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "venv" / ".stamp-dev").touch()

    def made():
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = made()
    assert done.returncode != 0
    assert "a ran" in done.stdout
    assert "c ran" not in done.stdout
    assert "documents made" not in done.stdout
    (benchmarks / "b.py").write_text("print('b ran')")
    done = made()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "c ran" in done.stdout
    assert "documents made" in done.stdout
