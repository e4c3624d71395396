"""Console lines, the live table, throughput."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest

from megatron.monitor import StepRecord, Throughput, ValidationRecord
from megatron.monitor.console import LINE_WIDTH, ConsoleSink
from megatron.monitor.interval import Interval
from megatron.monitor.throughput import duration, short


def record(step: int, names: tuple[str, ...] = ("code", "prose"), **more: Any) -> StepRecord:
    count = len(names)
    samples = np.zeros(count)
    samples[step % count] = 4
    fields: dict[str, Any] = {
        "step": step,
        "domains": names,
        "loss": 2.5,
        "learning_rate": 3e-4,
        "probability": np.full(count, 1 / count),
        "domain_loss": np.where(samples > 0, 1.0 + step, np.nan),
        "tokens": samples * 10,
        "samples": samples,
        "epochs": np.full(count, 0.25),
        "tokens_per_second": 18_240.0,
        "eta_seconds": 134.0,
    }
    return StepRecord(**{**fields, **more})


def plain(total: int | None = 1000, interval: int = 2) -> tuple[ConsoleSink, io.StringIO]:
    stream = io.StringIO()
    return ConsoleSink(log_interval=interval, total_steps=total, stream=stream), stream


def test_plain_lines_tell_what_matters() -> None:
    sink, stream = plain()
    sink.start(None, {})
    for step in range(1, 5):
        sink.step(record(step))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert lines[-2] == "step    4/1000 · loss 2.5000 · lr 0.0003 · 18.2k tok/s · ETA 2m14s"
    # Means over the steps since the line before: step 3 was prose's, step 4 code's.
    assert lines[-1] == "    code 50.0% 5.0000 | prose 50.0% 4.0000"
    assert len(lines) == 6
    assert "\x1b" not in stream.getvalue()


def test_absent_domains_and_skipped_steps() -> None:
    sink, stream = plain(total=None, interval=1)
    sink.start(7, {})
    sink.step(record(8, loss=float("nan"), skipped=True, mfu=0.412, grad_norm=1.25))
    text = stream.getvalue()
    assert "going on after step 7" in text
    assert "step 8 · loss – · lr 0.0003 · gradient 1.25" in text
    assert "MFU 41.2%" in text
    assert "update skipped" in text
    assert "prose 0.0% –" in text


def test_validation_shows_the_change_since_the_first() -> None:
    sink, stream = plain()
    sink.validation(ValidationRecord(step=0, valid_loss={"code": 4.0, "prose": 2.0}))
    sink.validation(ValidationRecord(step=10, valid_loss={"code": 3.0, "prose": 2.5}))
    sink.validation(ValidationRecord(step=10, valid_loss={"code": 1.0}, split="test"))
    text = stream.getvalue()
    assert "step 10 · validation loss 2.7500 (mean of domains)" in text
    assert "code 3.0000 (-25.0%) | prose 2.5000 (+25.0%)" in text
    assert "test loss 1.0000" in text


def test_many_domains_do_not_flood_the_log() -> None:
    names = tuple(f"domain-{i:04d}" for i in range(1000))
    sink, stream = plain(interval=1)
    sink.step(record(1, names))
    sink.validation(ValidationRecord(step=1, valid_loss=dict.fromkeys(names, 1.0)))
    lines = stream.getvalue().splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) <= LINE_WIDTH
    assert stream.getvalue().count("and 976 more domains") == 2
    assert "domain-0001 100.0%" in lines[1]  # the one that was drawn comes first


def test_live_table_on_a_terminal() -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    sink = ConsoleSink(total_steps=10, stream=stream)
    sink.start(None, {})
    sink.validation(ValidationRecord(step=0, valid_loss={"code": 4.0, "prose": 4.0}))
    for step in range(1, 6):
        sink.step(record(step))
    sink.validation(ValidationRecord(step=5, valid_loss={"code": 2.0, "prose": 5.0}))
    sink.close()
    sink.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step  5/10" in text
    assert "█" in text
    assert "2.0000 (-50.0%)" in text
    assert "5.0000 (+25.0%)" in text


def test_interval_weights_by_tokens() -> None:
    interval = Interval()
    interval.add(record(2, tokens=[30, 0], samples=[3, 0], domain_loss=[1.0, np.nan]))
    interval.add(
        record(4, tokens=[10, 5], samples=[1, 1], domain_loss=[5.0, np.inf], probability=[0.9, 0.1])
    )
    assert interval.domain_loss[0] == 2.0
    assert np.isnan(interval.domain_loss[1])
    assert interval.loss == 2.0
    assert interval.share.tolist() == [0.8, 0.2]
    np.testing.assert_allclose(interval.asked, [(0.5 * 3 + 0.9 * 2) / 5, (0.5 * 3 + 0.1 * 2) / 5])
    interval.clear()
    assert np.isnan(interval.loss)
    interval.add(record(1, ("a", "b", "c")))
    assert interval.domains == ("a", "b", "c")
    assert interval.steps == 1


def test_throughput_leaves_pauses_out() -> None:
    now = [0.0]
    meter = Throughput(window=2, flops_per_token=10.0, peak_flops=4000.0, clock=lambda: now[0])
    assert meter.tokens_per_second is None
    assert meter.eta_seconds(5) is None
    assert meter.mfu is None
    for seconds in (9.0, 1.0):
        now[0] += seconds
        assert meter.step(200) == seconds
    meter.pause()
    meter.pause()
    now[0] += 100
    meter.resume()
    now[0] += 3.0
    assert meter.step(200) == pytest.approx(3.0)
    assert meter.tokens_per_second == pytest.approx(100.0)  # 400 tokens in 1 + 3 seconds
    assert meter.eta_seconds(10) == pytest.approx(20.0)
    assert meter.eta_seconds(-1) == 0
    assert meter.mfu == pytest.approx(0.25)
    assert Throughput().mfu is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (18_420, "5h07m"), (187_200, "2d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1.00k"),
        (18_240, "18.2k"),
        (3.41e6, "3.41M"),
        (3e11, "300B"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
