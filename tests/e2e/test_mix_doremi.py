"""``tools/mix.py doremi`` from the command line, killed in its proxy and begun again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from support import kills, runs, studies

from megatron.data.writer import TokenWriter
from megatron.experiments.table import read_table, tag

pytestmark = pytest.mark.slow


def make_data(folder: Path) -> None:
    """Write a domain that can be learnt, and one of independent random tokens."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("learnable", "noise"):
        with TokenWriter(folder / name, np.uint16) as writer:
            for _ in range(300):
                length = int(random.integers(50, 200))
                tokens = random.integers(0, 100, length)
                if name == "learnable":
                    tokens = (random.integers(0, 100) + 7 * np.arange(length)) % 100
                writer.add(tokens.astype(np.uint16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doremi")
    make_data(place / "data")
    domains = {n: {"train": str(place / "data" / n), "weight": 1} for n in ("learnable", "noise")}
    studies.base(
        place,
        domains=domains,
        mixing={"method": "static"},
        train_iters=120,
        save_interval=10,
        eval_interval=120,
    )
    return place


def proxy(folder: Path) -> Path | None:
    """Return the folder of the proxy once it has a checkpoint."""
    for request in (folder / "runs").glob("*/runner/request.yml"):
        run = request.parents[1]
        if "method: doremi" in request.read_text() and (run / "checkpoints" / "latest").exists():
            return run
    return None


def test_noise_gets_less_than_its_share_and_a_killed_chain_goes_on(folder):
    out = folder / "out"
    words = ["doremi", str(folder / "base.yml"), "--out", str(out), "--baseline", "given"]
    kills.kill_once(folder, lambda: proxy(folder) is not None, *words)
    assert not out.joinpath("mixture.yml").exists()

    again = runs.tool("mix.py", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "reference-1 started" not in again.stdout
    assert again.stdout.count("proxy-1 started") == 1
    half = proxy(folder)
    assert half is not None
    assert "/checkpoints/global_step" in (half / "runner" / "output.log").read_text()

    found = yaml.safe_load((out / "mixture.yml").read_text())["mixing"]["weights"]
    assert found.keys() == {"learnable", "noise"}
    assert sum(found.values()) == pytest.approx(1)
    assert found["noise"] < 0.45
    rows = read_table(out)
    assert {(row["run"], row["method"], tag(row, "role")) for row in rows} == {
        ("reference-1", "static", "reference"),
        ("proxy-1", "doremi", "proxy"),
    }
    assert "| 0 | 0.5000 | 0.5000 |" in (out / "summary.md").read_text()
