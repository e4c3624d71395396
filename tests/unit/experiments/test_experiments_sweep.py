"""``tools/mix.py sweep`` and what all such commands share, with runs that only pretend."""

from __future__ import annotations

import argparse
import json

import pytest
import yaml
from support import runs, studies

from megatron.errors import ConfigError
from megatron.experiments.commands import sweep
from megatron.experiments.conduct import conduct
from megatron.experiments.execute import execute
from megatron.experiments.fixed_mixtures import plan_mixtures
from megatron.experiments.table import read_table


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    runs.make_data(place / "data")
    studies.base(place)
    return place


def options(data, out, *words):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args([str(data / "base.yml"), "--out", str(out), *words])


def planned(given):
    base = sweep.base_of(given)
    points = sweep.design_points(given, tuple(base.load().trained))
    return plan_mixtures(base, points, given.seeds, sweep.runs_dir(given), name="sweep")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--design", "grid", "--points", "2"], 6),
        (["--design", "grid"], 15),
        (["--design", "one-hot", "--seeds", "1", "2"], 6),
        (["--design", "dirichlet", "--points", "5", "--floor", "0.1"], 5),
        (["--points", "4"], 4),
        ([], 24),
    ],
)
def test_designs_become_runs(data, tmp_path, words, count):
    study = planned(options(data, tmp_path / "out", *words))
    assert len(study.runs) == count
    for run in study.runs:
        assert sum(run.weights.values()) == pytest.approx(1)
        assert run.method == "static"
        assert run.folder.parent == tmp_path / "runs"
    if "--floor" in words:
        assert min(min(run.weights.values()) for run in study.runs) >= 0.1 - 1e-9


def test_designs_share_their_runs(data, tmp_path):
    grid = planned(options(data, tmp_path / "a", "--design", "grid", "--points", "2"))
    corners = planned(options(data, tmp_path / "b", "--design", "one-hot"))
    assert {run.key for run in corners.runs} < {run.key for run in grid.runs}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--points", "0"], "--points is 0"),
        (["--design", "one-hot", "--points", "3"], "one-hot"),
        (["--seeds", "1", "1"], "give each once"),
        (["--floor", "0.5"], "floors sum"),
    ],
)
def test_wrong_designs_are_refused(data, tmp_path, words, match):
    with pytest.raises(ConfigError, match=match):
        planned(options(data, tmp_path / "out", *words))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--rate", "0"], "--rate is 0"),
        (["--slurm", "--command", "{command}"], "exclude"),
        (["--time", "1:00"], "--time belongs to --slurm"),
        (["--jobs", "0"], "--jobs is 0"),
    ],
)
def test_wrong_ways_to_run_are_refused(data, tmp_path, words, match):
    given = options(data, tmp_path / "out", "--design", "one-hot", *words)
    with pytest.raises(ConfigError, match=match):
        conduct(planned(given), given, lambda _: None)


def test_a_dry_run_lists_everything_and_writes_nothing(data, tmp_path):
    given = options(data, tmp_path / "out", "--design", "one-hot", "--dry-run", "--rate", "1e6")
    said: list[str] = []
    study = planned(given)
    assert conduct(study, given, said.append) is None
    text = "\n".join(said)
    for run in study.runs:
        assert f"to do {run.key} {run.name}: static" in text
    assert "3 runs, 4.61k tokens" in text
    assert "about" in text
    assert list(tmp_path.iterdir()) == []


def test_an_array_has_a_task_for_every_run_that_is_left(data, tmp_path):
    given = options(
        data, tmp_path / "out", "--design", "one-hot", "--slurm", "--jobs", "2", "--time", "2:00:00"
    )
    study = planned(given)
    execute(study.runs[:1], studies.pretending("good"), say=lambda _: None)
    said: list[str] = []
    assert conduct(study, given, said.append) is None
    tasks = (tmp_path / "out" / "array.txt").read_text().splitlines()
    assert tasks == [str(run.request) for run in study.runs[1:]]
    for run in study.runs[1:]:
        assert yaml.safe_load(run.request.read_text())["run_dir"] == str(run.folder)
    script = (tmp_path / "out" / "array.sbatch").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert 'deepy.py train.py "$task" --set launcher=slurm' in script
    assert f'"$((SLURM_ARRAY_TASK_ID + 1))p" {tmp_path / "out" / "array.txt"}' in script
    execute(study.runs, studies.pretending("good"), say=lambda _: None)
    outcome = conduct(study, given, said.append)
    assert outcome is not None
    assert outcome.exit_code == 0


def test_results_name_the_best_and_the_failed(data, tmp_path, capsys):
    given = options(data, tmp_path / "out", "--design", "one-hot", "--seeds", "1", "2")
    study = planned(given)
    starter = studies.pretending("point-0-seed-2:bad")
    outcome = execute(study.runs, starter, retries=0, say=lambda _: None)
    assert sweep.write_results(study, outcome, tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "failed: point-0-seed-2: exit code 3" in shown
    weights = yaml.safe_load((tmp_path / "out" / "mixture.yml").read_text())["mixing"]["weights"]
    assert weights == {"walk": 0.0, "drift": 1.0, "noise": 0.0}  # equal losses: the first whole one
    assert "point-0-seed-2: exit code 3" in (tmp_path / "out" / "summary.md").read_text()
    assert {row["run"] for row in read_table(tmp_path / "out")} == {
        run.name for run in study.runs if run.name != "point-0-seed-2"
    }


def test_the_plan_is_kept_with_the_results(data, tmp_path):
    given = options(data, tmp_path / "out", "--design", "one-hot")
    study = planned(given)
    plan = json.loads(study.write_plan(tmp_path / "out").read_text())
    assert [run["key"] for run in plan["runs"]] == [run.key for run in study.runs]
    assert plan["domain_tokens"].keys() == {"walk", "drift", "noise"}
    assert plan["tokens"] == study.tokens
