"""``tools/score_data.py`` as a user starts it: killed, gone on with, on any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs

from megatron.data.loss_header import HEADER_NAME, StoreHeader, read_header

TOOL = runs.ROOT / "tools" / "score_data.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a reference that one rank trained."""
    folder = tmp_path_factory.mktemp("scoring")
    runs.make_data(folder / "data", documents=400)
    runs.train(write(folder, "reference", num_gpus=1, train_iters=3, mixing={"method": "static"}))
    return folder


def write(folder: Path, name: str, **changes: Any) -> Path:
    content = runs.config(folder / "data", folder / name, **changes)
    return runs.write_config(folder / f"{name}.yml", content)


def arguments(folder: Path, out: str, *further: str) -> list[str]:
    own = ["--checkpoint", str(folder / "reference"), "--out", str(folder / out)]
    return [str(folder / "reference.yml"), *own, *further]


def header(folder: Path) -> StoreHeader | None:
    return read_header(folder, "") if (folder / HEADER_NAME).exists() else None


def progress(folder: Path) -> int:
    found = header(folder)
    return 0 if found is None else sum(sum(one.scored) for one in found.domains.values())


def test_what_was_killed_goes_on_and_is_not_scored_again(folder: Path) -> None:
    whole = runs.tool("score_data.py", *arguments(folder, "whole", "--epochs", "2"))
    assert whole.returncode == 0, whole.stderr
    assert "whole is complete" in whole.stdout

    process = subprocess.Popen(
        [
            *(sys.executable, str(TOOL)),
            *arguments(folder, "killed", "--epochs", "2", "--set", "num_gpus=2"),
        ],
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out, deadline = folder / "killed", time.monotonic() + 120
    while progress(out) == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    family = list(runs.family(process.pid))
    for pid in family:
        runs.with_suppressed_kill(pid)
    process.wait(timeout=30)

    found = header(out)
    assert found is not None
    walk = found.domains["walk"]
    assert walk.scored[0] > 0
    assert not all(one.complete for one in found.domains.values())
    # A run does not take it as it is.
    mixing = {"method": "doremi", "reference_losses": str(out)}
    early = runs.run("--check", "train.py", write(folder, "early", mixing=mixing))
    assert early.returncode == 2
    assert "is unfinished" in early.stderr
    assert f"--out {out}" in early.stderr

    losses = np.memmap(out / walk.file, "<f2", mode="r+", shape=(2, walk.tokens))
    done = np.zeros(walk.tokens, dtype=bool)
    known = np.flatnonzero(np.isfinite(losses[0]))[: 16 * walk.scored[0]]
    done[known] = True
    kept = losses[0, done].copy()
    losses[0, done] = 7.0
    losses.flush()
    again = runs.tool("score_data.py", *arguments(folder, "killed", "--epochs", "2"))
    assert again.returncode == 0, again.stderr
    assert (losses[0, done] == 7.0).all()
    losses[0, done] = kept
    losses.flush()
    for scores in read_header(out, "").domains.values():
        one, other = (
            np.fromfile(folder / name / scores.file, "<i2").astype(int)
            for name in ("killed", "whole")
        )
        assert np.abs(one - other).max() <= 1
    assert read_header(out, "") == read_header(folder / "whole", "")

    # Nothing is left to do, and nothing of the way there is left.
    more = runs.tool("score_data.py", *arguments(folder, "killed"))
    assert more.returncode == 0, more.stderr
    assert "windows," not in more.stdout
    assert not (out / "model").exists()
    assert not (out / "run.lock").exists()


def test_what_cannot_be_scored_ends_with_one_message(folder: Path) -> None:
    for words, further in (
        ("no reference model in", ["--checkpoint", str(folder / "nothing")]),
        ("holds no checkpoint of step 7; it has", ["--iteration", "7"]),
        ("there is no domain 'walks'; did you mean 'walk'?", ["--domains", "walks"]),
        ("seq_length (reference 16, run 8)", ["--set", "seq_length=8"]),
    ):
        for ranks in (1, 2):
            done = runs.tool(
                "score_data.py",
                *arguments(folder, "refused", *further, "--set", f"num_gpus={ranks}"),
            )
            assert done.returncode == 2, (further, done.stdout, done.stderr)
            assert words in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
    done = runs.tool("score_data.py", str(folder / "reference.yml"))
    assert done.returncode == 2
    assert "--checkpoint: say which model scores" in done.stderr


def test_epochs_are_those_of_the_run_unless_given(folder: Path) -> None:
    weighted = {
        "domains": {
            name: {"train": str(folder / "data" / name), "weight": weight}
            for name, weight in (("walk", 8.0), ("drift", 1.0), ("noise", 1.0))
        },
        "mixing": {
            "method": "doremi",
            "reference": str(folder / "reference"),
        },
        "train_iters": 500,
        "num_gpus": 1,
    }
    file = write(folder, "weighted", **weighted)
    done = runs.tool("score_data.py", str(file), "--out", str(folder / "default"))
    assert done.returncode == 0, done.stderr
    domains = read_header(folder / "default", "").domains
    assert {name: len(one.windows) for name, one in domains.items()} == {
        "walk": 2,
        "drift": 1,
        "noise": 1,
    }
    content = json.loads((folder / "default" / HEADER_NAME).read_text())
    assert content["seed"] == 1234
    file = write(folder, "use", **{
        **weighted,
        "mixing": {"method": "doremi", "reference_losses": str(folder / "default")},
    })  # fmt: skip
    assert runs.run("--check", "train.py", file).returncode == 0
    longer = runs.run("--check", "train.py", file, "--set", "train_iters=1500")
    assert longer.returncode == 2
    assert "--epochs 5" in longer.stderr
