"""Runs that are forked from a process that has done their imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import runs, studies

from megatron.experiments import warm
from megatron.experiments.execute import execute
from megatron.experiments.finished import read_finish
from megatron.experiments.starting import OUTPUT, Starter
from megatron.experiments.warm import WarmParent
from megatron.launch.devices import Devices
from megatron.launch.process import process_info, session_members
from megatron.monitor.record import TIME_FIELDS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only there")

# Stands for train.py: what a run would be asked in a process of its own.
ASKED = """
import json, os, random, signal, sys, threading, time

SEED = random.random()

def main():
    what = sys.argv[1]
    if what == "facts":
        print(json.dumps({
            "argv": sys.argv, "cwd": os.getcwd(), "pid": os.getpid(), "session": os.getsid(0),
            "threads": os.environ["OMP_NUM_THREADS"], "random": random.random(),
            "handlers": [signal.getsignal(n) is signal.SIG_DFL for n in (15, 10, 1, 17)],
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "files": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                            if n not in "012" and os.path.exists(f"/proc/self/fd/{n}")),
            "path": sys.path[0],
        }))
    elif what == "exit":
        sys.exit(int(sys.argv[2]))
    elif what == "words":
        sys.exit("too bad")
    elif what == "raise":
        raise KeyError("lost")
    elif what == "signal":
        os.kill(os.getpid(), int(sys.argv[2]))
    elif what == "sleep":
        print("asleep")
        time.sleep(60)
"""

# Imports nothing but the stand-in; the rest is what it is.
SERVER = """
import sys
sys.path[:0] = [sys.argv[1], {root!r}]
from megatron.experiments import forking
forking._preload = {preload}
forking.serve(int(sys.argv[2]))
"""
STAND_IN = "lambda: __import__('train') and None"


@pytest.fixture
def start_parent(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(ASKED, encoding="utf-8")
    parents = []

    def start(preload: str = STAND_IN) -> WarmParent:
        program = SERVER.format(root=str(runs.ROOT), preload=preload)
        monkeypatch.setattr(warm, "_PROGRAM", program)
        parent = WarmParent(tmp_path, runs.environment(OMP_NUM_THREADS="3"))
        parents.append(parent)
        give_up = time.monotonic() + 60
        while not parent.settled() and time.monotonic() < give_up:
            time.sleep(0.02)
        return parent

    yield start
    for parent in parents:
        parent.close()


def _start(parent: WarmParent, folder: Path, *arguments: str) -> tuple[warm.WarmRun, Path]:
    log = folder / "log"
    with log.open("ab") as output:
        run = parent.start(["train.py", *arguments], output)
    assert run is not None, parent.trouble
    return run, log


def test_a_forked_run_is_what_a_fresh_process_is(start_parent, tmp_path):
    parent = start_parent()
    drawn = set()
    for _ in range(2):
        (tmp_path / "log").unlink(missing_ok=True)
        run, log = _start(parent, tmp_path, "facts", "request.yml")
        assert run.wait() == 0
        facts = json.loads(log.read_text(encoding="utf-8"))
        assert facts["argv"] == ["train.py", "facts", "request.yml"]
        assert facts["cwd"] == os.getcwd()
        assert facts["session"] == facts["pid"] == run.pid
        assert facts["threads"] == "3"
        assert facts["handlers"] == [True] * 4
        assert facts["blocked"] == []
        assert facts["files"] == []
        drawn.add(facts["random"])
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("exit", "0"), 0, ""),
        (("exit", "3"), 3, ""),
        (("words",), 1, "too bad"),
        (("raise",), 1, "KeyError: 'lost'"),
        (("signal", "9"), -9, ""),
        (("signal", "15"), -15, ""),
    ],
)
def test_its_end_is_told_as_popen_tells_it(start_parent, tmp_path, arguments, code, words):
    run, log = _start(start_parent(), tmp_path, *arguments)
    assert run.wait() == code
    assert run.poll() == code
    assert words in log.read_text(encoding="utf-8")


def _gone(pid: int) -> bool:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        info = process_info(pid)
        if info is None or info.state in "ZX":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_runs_die_with_what_forked_them(start_parent, tmp_path, how):
    parent = start_parent()
    run, _ = _start(parent, tmp_path, "sleep")
    assert run.poll() is None
    if how == "closed":
        parent.close()
    else:
        os.kill(parent.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert _gone(run.pid)
    assert parent.trouble is not None
    with (tmp_path / "log").open("ab") as output:
        assert parent.start(["train.py", "exit", "0"], output) is None


@pytest.mark.parametrize(
    ("preload", "why"),
    [
        ("lambda: 'there are CUDA devices'", "there are CUDA devices"),
        ("lambda: 1 / 0", "ZeroDivisionError: division by zero"),
        ("lambda: __import__('os')._exit(3)", "it ended"),
        ("lambda: (print('no disk'), __import__('os')._exit(3))", "it ended (no disk)"),
    ],
)
def test_what_cannot_fork_says_so(start_parent, tmp_path, preload, why):
    parent = start_parent(preload)
    assert parent.settled()
    assert parent.trouble == why
    with (tmp_path / "log").open("ab") as output:
        assert parent.start(["train.py", "exit", "0"], output) is None


def test_nothing_is_forked_beside_threads(start_parent, tmp_path):
    parent = start_parent(
        "lambda: __import__('threading').Thread(target=lambda: __import__('time').sleep(60), "
        "daemon=True).start()"
    )
    with (tmp_path / "log").open("ab") as output:
        assert parent.start(["train.py", "exit", "0"], output) is None
    assert parent.trouble == "it has 2 threads"


def test_runs_die_with_a_runner_that_is_killed(tmp_path):
    (tmp_path / "train.py").write_text(ASKED, encoding="utf-8")
    server = SERVER.format(root=str(runs.ROOT), preload=STAND_IN)
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {str(runs.ROOT)!r})
from pathlib import Path
from megatron.experiments import warm
warm._PROGRAM = {server!r}
parent = warm.WarmParent(Path({str(tmp_path)!r}), os.environ)
while not parent.settled():
    time.sleep(0.02)
with open({str(tmp_path / "log")!r}, "ab") as output:
    run = parent.start(["train.py", "sleep"], output)
print(run.pid, parent.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=runs.environment()
    ) as runner:
        assert runner.stdout is not None
        run, parent = map(int, runner.stdout.readline().split())
        assert session_members(run) == [run]
        runner.kill()
    assert _gone(run)
    assert _gone(parent)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("warm")
    runs.make_data(place / "data")
    return place


def _ledger(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    for record in kept:
        for name in (*TIME_FIELDS, "run_dir"):
            record.pop(name, None)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_warm_and_cold_runs_compute_the_same(data, tmp_path, threads):
    environ = runs.environment(OMP_NUM_THREADS=threads)
    ledgers, said = {}, []
    for kind in (True, False):
        study = studies.plan(data, *studies.seeds(2), runs_dir=tmp_path / str(kind))
        starter = Starter(jobs=2, devices=Devices(cuda=(), cores=2), environ=environ, warm=kind)
        outcome = execute(study.runs, starter, retries=0, say=said.append)
        assert outcome.exit_code == 0, said
        ledgers[kind] = [_ledger(run.folder) for run in study.runs]
    assert "imports" not in "\n".join(said)
    assert len(ledgers[True][0]) > studies.STEPS
    assert ledgers[True] == ledgers[False]


@pytest.mark.slow
def test_a_study_goes_on_when_what_forks_its_runs_dies(data, tmp_path, monkeypatch):
    study = studies.plan(data, *studies.seeds(3), runs_dir=tmp_path / "runs")
    starter = Starter(jobs=1, devices=Devices(cuda=(), cores=2), environ=runs.environment())
    parents, said = [], []
    begin = Starter.preload

    def preload(self, planned):
        parents.append(begin(self, planned))
        return parents[-1]

    def say(text: str) -> None:
        said.append(text)
        if "seed-1 started" in text and len(parents) == 1 and parents[0].trouble is None:
            os.kill(parents[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Starter, "preload", preload)
    outcome = execute(study.runs, starter, retries=1, say=say)
    assert outcome.exit_code == 0
    assert all(read_finish(run) is not None for run in study.runs)
    assert "seed-1 failed: it was killed by SIGKILL; it is started again" in "\n".join(said)
    assert "every run does its own imports from here on: it ended" in "\n".join(said)
    assert (study.runs[1].own / OUTPUT).read_text(encoding="utf-8").count("ended after step") == 1
