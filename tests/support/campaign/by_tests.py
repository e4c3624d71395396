"""Rows whose trials are tests already: run with pytest, counted by its report."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial

from support.campaign.row import Bench, Trial, Trials
from support.runs import ROOT


def pytest_row(*words: str, quick: tuple[str, ...] | None = None) -> Trials:
    """Return a row that runs tests.

    A test case is a trial; one that records the property ``trials`` stands for that many.

    Args:
        words: files and options of pytest.
        quick: the same for the column of continuous integration, where it differs.
    """
    return partial(_run, words, quick or words)


def _run(
    release: tuple[str, ...], ci: tuple[str, ...], bench: Bench, trials: int
) -> Iterator[Trial]:
    report = bench.folder / "report.xml"
    words = ci if bench.column == "ci" else release
    log = bench.folder / "pytest.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *(f"--junitxml={report}", "-m", "slow or not slow", *words),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
        )
    stopped = False
    try:
        process.wait(None if math.isinf(bench.minutes) else 60 * bench.minutes)
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)  # it reports of the tests that have ended
        process.wait()
    if process.returncode not in (0, 1) and not (stopped and report.exists()):
        yield Trial(failure=f"pytest ended with {process.returncode}\n{log.read_text()[-3000:]}")
        return
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None or (stopped and case.get("time") == "0.000"):
            continue
        broken = case.find("failure") if case.find("error") is None else case.find("error")
        counted = case.find("properties/property[@name='trials']")
        yield Trial(
            failure=None
            if broken is None
            else f"{case.get('name')}\n{(broken.text or '')[-2000:]}",
            count=1 if counted is None else int(counted.get("value", 1)),
            made=True,
        )
    if stopped:
        yield Trial(count=0, cut=True, made=True)
