"""What mixing cost: collected between records, and told by the report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.report_runs import LENGTH, SAMPLES, write_run
from support.source import ROOT

from megatron.monitor.overhead import KINDS, Overhead, overhead_text, seconds_text
from megatron.monitor.report import words, write_report
from megatron.monitor.report.cost import cost_sentences, costs
from megatron.monitor.report.load import load_runs


def ticking(*seconds: float) -> Callable[[], float]:
    """Return a clock that shows each of these in turn."""
    shown = iter(seconds)
    return lambda: next(shown)


def test_seconds_are_added_by_kind_and_taken_once() -> None:
    overhead = Overhead(ticking(10, 12, 20, 21, 30, 30.5))
    for kind in ("update", "validation", "update"):
        with overhead.time(kind):
            pass
    overhead.add("collective", 4.0)
    taken = overhead.take()
    assert taken == {"collective": 4.0, "update": 2.5, "validation": 1.0}
    assert list(taken) == [kind for kind in KINDS if kind in taken]
    assert overhead.take() == {}
    overhead.add("update", 0.5)
    overhead.take()
    assert overhead.total == {"collective": 4.0, "update": 3.0, "validation": 1.0}
    assert overhead_text(overhead.total) == "8 s (collective 4 s, update 3 s, validation 1 s)"


def test_work_that_fails_took_its_time() -> None:
    overhead = Overhead(ticking(1, 4))
    with pytest.raises(ZeroDivisionError), overhead.time("validation"):
        _ = 1 / 0
    assert overhead.take() == {"validation": 3}


def test_a_clock_that_stands_still_gives_nothing_but_the_kinds() -> None:
    overhead = Overhead(lambda: 0.0)
    with overhead.time("foresight"):
        pass
    assert overhead.take() == {"foresight": 0.0}


def test_an_unknown_kind_is_refused_before_the_work() -> None:
    overhead, done = Overhead(), []
    with pytest.raises(KeyError, match="'lunch' is no kind of cost"), overhead.time("lunch"):
        done.append(1)
    assert not done


class Event:
    """A device's event: passed when its stream is."""

    def __init__(self, stream: dict[str, float]) -> None:
        self.stream, self.at = stream, float("nan")

    def record(self) -> None:
        self.at = self.stream["queued"]

    def query(self) -> bool:
        return self.stream["done"] >= self.at

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query(), "read before it has passed: torch would raise"
        return end.at - self.at


def test_device_work_is_read_when_it_is_over_and_never_waited_for(monkeypatch) -> None:
    stream = {"queued": 0.0, "done": 0.0}
    monkeypatch.setattr("megatron.monitor.overhead._events", lambda: (Event(stream), Event(stream)))
    device = type("device", (), {"type": "cuda"})()
    overhead = Overhead(lambda: 0.0)
    for milliseconds in (500.0, 250.0):
        with overhead.time("reference", device):
            stream["queued"] += milliseconds
    assert overhead.take() == {}
    stream["done"] = 600.0
    assert overhead.take() == {"reference": 0.5}
    stream["done"] = 750.0
    assert overhead.take() == {"reference": 0.25}


def test_the_report_sums_what_was_recorded(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "run", cost=True)])
    collective, update, validation, total = costs(run)
    trained = 60 * SAMPLES * LENGTH
    assert (collective.kind, collective.seconds) == ("collective", pytest.approx(60 * 0.02))
    assert (update.kind, update.of_time) == ("update", pytest.approx(0.03))
    assert (validation.tokens, validation.of_tokens) == (6 * 512, 6 * 512 / trained)
    assert (total.seconds, total.tokens) == (pytest.approx(60 * 0.08), 6 * 512)
    (sentence,) = cost_sentences(run)
    assert sentence == (
        "Mixing cost 4.8 s, 4.00% of the training time (most of it update) and 3.07k extra "
        "tokens, 2.50% of those trained on (validation)."
    )


def text_of(page: str) -> str:
    section = re.search(r'<section id="cost">.*?</section>', page, flags=re.DOTALL)
    return "" if section is None else re.sub(r"<[^>]+>", " ", section[0])


def test_the_page_has_a_section_of_its_own(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "run", cost=True)]).read_text()
    shown = " ".join(text_of(page).split())
    assert "What mixing cost" in shown
    assert "collective 1.2 s 1.00% –" in shown
    assert "validation – 3.07k 2.50%" in shown
    assert "all 4.8 s 4.00% 3.07k 2.50%" in shown


def test_runs_are_set_side_by_side(tmp_path: Path) -> None:
    costly = write_run(tmp_path / "odm", cost=True)
    plain = write_run(tmp_path / "plain", method="static")
    page = write_report([costly, plain]).read_text()
    shown = " ".join(text_of(page).split())
    assert "odm seconds" in shown
    assert "plain extra tokens" in shown
    assert "update 3.6 s 3.00% – – –" in shown
    assert "Mixing cost 4.8 s" in page  # in the run's own words as well


def test_a_run_without_records_of_cost_has_no_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert text_of(write_report([folder]).read_text()) == ""
    assert "Mixing cost" not in words([folder])


def test_words_are_printed_when_asked_for(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / name, cost=True)) for name in ("odm", "exp3")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "report.py"), *folders, "--words"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count("Mixing cost 4.8 s") == 2
    assert "Compared at" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "odm" / "report.html")


def test_kinds_of_a_later_version_do_not_break_the_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", cost=True)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "overhead" in row:
            row["overhead"]["telepathy"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Mixing cost 4.8 s" in words([folder])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 µs"), (8.5e-5, "85 µs"), (0.0123, "12.3 ms"), (4.561, "4.56 s"), (1234.4, "1,234 s")],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
