"""Carrying a study out: caching, failures, retries, locks, signals."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from support import runs, studies

from megatron.errors import ConfigError
from megatron.experiments.execute import execute
from megatron.experiments.finished import read_finish
from megatron.experiments.starting import Starter
from megatron.launch.devices import Devices
from megatron.launch.lock import RunLock

TWO_CORES = Devices(cuda=(), cores=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("execute")
    runs.make_data(place / "data")
    return place


@pytest.fixture
def study(data, tmp_path):
    return studies.plan(data, *studies.seeds(3), runs_dir=tmp_path / "runs")


def test_every_run_is_done_once(study):
    said: list[str] = []
    outcome = execute(study.runs, studies.pretending("good", jobs=2), say=said.append)
    assert outcome.exit_code == 0
    assert {run.name for run in outcome.finished} == {run.name for run in study.runs}
    assert sorted(outcome.started) == sorted(run.name for run in study.runs)
    assert [studies.starts(run) for run in study.runs] == [1, 1, 1]
    finish = read_finish(study.runs[0])
    assert finish is not None
    assert (finish.step, finish.attempts) == (studies.STEPS, 1)
    again = execute(study.runs, studies.pretending("bad"), say=said.append)
    assert (again.exit_code, again.started, len(again.finished)) == (0, (), 3)
    assert "3 of 3 runs are finished already" in said[-1]


def test_a_failed_run_is_started_again_and_told_of(study):
    said: list[str] = []
    outcome = execute(study.runs[:1], studies.pretending("once"), retries=1, say=said.append)
    assert outcome.exit_code == 0
    assert studies.starts(study.runs[0]) == 2
    text = "\n".join(said)
    assert "exit code 3; it is started again" in text
    assert "eaten by a dog" in text


def test_a_run_that_fails_for_good_does_not_stop_the_others(study):
    said: list[str] = []
    starter = studies.pretending("seed-1:bad", jobs=2)
    outcome = execute(study.runs, starter, retries=2, say=said.append)
    assert outcome.exit_code == 1
    assert [run.name for run in outcome.finished] == ["seed-0", "seed-2"]
    ((run, why, attempts),) = [(f.run.name, f.why, f.attempts) for f in outcome.failed]
    assert (run, why, attempts) == ("seed-1", "exit code 3", 3)
    assert [studies.starts(run) for run in study.runs] == [1, 3, 1]
    assert "failed for good" in "\n".join(said)
    later = execute(study.runs, studies.pretending("good"), say=said.append)
    assert (later.exit_code, later.started) == (0, ("seed-1",))


def test_a_command_that_does_not_wait_for_its_run_is_no_success(study):
    outcome = execute(study.runs[:1], studies.pretending("short"), retries=0, say=lambda _: None)
    assert "step 7 of 12" in outcome.failed[0].why
    assert read_finish(study.runs[0]) is None


def test_runs_that_share_a_folder_are_done_once(data, tmp_path):
    twice = [
        *studies.seeds(1),
        *[v.__class__(name="b", overrides=v.overrides) for v in studies.seeds(1)],
    ]
    study = studies.plan(data, *twice, runs_dir=tmp_path / "runs")
    execute(study.runs, studies.pretending("good"), say=lambda _: None)
    assert studies.starts(study.runs[0]) == 1


@pytest.mark.parametrize("inner", [True, False])
def test_a_run_that_another_process_does_is_waited_for(study, inner):
    run = study.runs[0]
    lock = RunLock(run.own if inner else run.folder).acquire()
    said: list[str] = []

    def let_go() -> None:
        while not said:
            time.sleep(0.02)
        lock.release()

    thread = threading.Thread(target=let_go)
    thread.start()
    outcome = execute([run], studies.pretending("good"), say=said.append)
    thread.join()
    assert outcome.exit_code == 0
    assert "waits" in said[0]
    assert studies.starts(run) == 1


@pytest.mark.parametrize("shell", [False, True])
def test_a_stopped_runner_lets_its_runs_save(study, shell):
    said: list[str] = []
    first = study.runs[0]

    def stop() -> None:
        while not (first.folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    outcome = execute(study.runs, studies.pretending("slow", shell=shell), say=said.append)
    thread.join()
    assert outcome.stopped == signal.SIGTERM
    assert outcome.exit_code == 143
    assert outcome.started == ("seed-0",)
    assert "stopped after step 5" in said[-1]
    assert not (first.own / "run.lock").exists()


def test_the_command_of_a_run(study, monkeypatch):
    (run,) = study.runs[:1]
    starter = Starter(jobs=2, devices=TWO_CORES, environ={})
    words = starter.command(run, run.request, 0)
    assert words[-2].endswith("/train.py")
    assert starter.environment(run, 0)["OMP_NUM_THREADS"] == "1"
    given = Starter(jobs=2, devices=TWO_CORES, environ={"OMP_NUM_THREADS": "7"})
    assert given.environment(run, 0)["OMP_NUM_THREADS"] == "7"
    remote = Starter(jobs=1, devices=TWO_CORES, template="ssh host{slot} {command}")
    assert [word.rpartition("/")[2] for word in remote.command(run, run.request, 0)][2:4] == [
        "deepy.py",
        "train.py",
    ]


def test_runs_of_several_ranks_go_through_the_launcher(data, tmp_path):
    study = studies.plan(
        data, num_gpus=2, train_micro_batch_size_per_gpu=4, runs_dir=tmp_path / "runs"
    )
    (run,) = study.runs
    starter = Starter(jobs=1, devices=TWO_CORES)
    assert run.ranks == 2
    assert starter.command(run, run.request, 0)[2].endswith("/deepy.py")


def test_runs_at_a_time_share_out_the_devices(study):
    gpus = Devices(cuda=("0", "1", "2"), cores=8)
    starter = Starter(jobs=4, devices=gpus, environ={})
    shares = [starter.environment(study.runs[0], s)["CUDA_VISIBLE_DEVICES"] for s in range(4)]
    assert shares == ["0", "1", "2", "0"]
    alone = Starter(jobs=1, devices=gpus, environ={})
    assert "CUDA_VISIBLE_DEVICES" not in alone.environment(study.runs[0], 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"jobs": 0}, "--jobs is 0"),
        ({"jobs": 1, "template": "ssh host"}, "write {command}"),
        ({"jobs": 1, "template": "ssh {hots} {command}"}, "{hots}"),
    ],
)
def test_wrong_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        Starter(devices=TWO_CORES, **options)


def test_negative_retries_are_refused(study):
    with pytest.raises(ConfigError, match="--retries is -1"):
        execute(study.runs, studies.pretending("good"), retries=-1)
