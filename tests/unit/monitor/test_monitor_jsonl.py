"""metrics.jsonl, mixture.jsonl and samples.jsonl: names, exactness, resume."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.monitor import TIME_FIELDS, AuditRecord, StepRecord, ValidationRecord, is_logged
from megatron.monitor.jsonl import JsonlSink

DOMAINS = ("code", "prose", "names")


def record(step: int, **more: Any) -> StepRecord:
    rng = np.random.default_rng(step)
    samples = rng.multinomial(8, [0.6, 0.39, 0.01])
    fields: dict[str, Any] = {
        "step": step,
        "domains": DOMAINS,
        "loss": float(rng.normal(3, 1)),
        "learning_rate": 1e-4 / step,
        "probability": rng.dirichlet(np.ones(3)),
        "domain_loss": np.where(samples > 0, rng.normal(3, 1, 3), np.nan),
        "tokens": samples * 128,
        "samples": samples,
        "epochs": rng.random(3),
        "tokens_per_second": 1234.5,
        "seconds": 0.25,
    }
    return StepRecord(**{**fields, **more})


def validation(step: int, **more: Any) -> ValidationRecord:
    losses = {name: 4.0 / (step + 1) + k for k, name in enumerate(DOMAINS)}
    return ValidationRecord(**{"step": step, "valid_loss": losses, "seconds": 1.5, **more})


def audit(step: int) -> AuditRecord:
    return AuditRecord(step=step, samples=[["code", 0, step], ["prose", 1, 2 * step]])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def run(folder: Path, start: int, stop: int, *, die: bool = False, slow: float = 1.0) -> None:
    """Train from ``start`` to ``stop``; validate on start and every 5 steps, save as often."""
    sink = JsonlSink(folder, log_interval=2, audit=True)
    sink.start(start or None, {"domains": list(DOMAINS)})
    sink.validation(validation(start, seconds=slow))
    for step in range(start + 1, stop + 1):
        sink.audit(audit(step))
        cost = {"update": 0.1 * slow, "collective": 0.2 * slow}
        tokens = {"validation": 64 * step} if step % 3 == 0 else {}
        sink.step(
            record(
                step,
                tokens_per_second=9.0 * slow,
                seconds=slow,
                overhead=cost,
                extra_tokens=tokens,
            )
        )
        if step % 5 == 0:
            sink.validation(validation(step, seconds=slow))
            sink.flush()
    if not die:
        sink.close()


def test_the_ledger_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    rows = read(tmp_path / "mixture.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    source = record(2)
    row = rows[1]
    assert list(row) == ["step", "probability", "domain_loss", "tokens", "samples", "epochs"]
    for name in ("probability", "epochs"):
        assert list(row[name]) == list(DOMAINS)
        assert np.array(list(row[name].values())).tobytes() == getattr(source, name).tobytes()
    for k, name in enumerate(DOMAINS):
        if source.tokens[k]:
            assert row["domain_loss"][name] == source.domain_loss[k]
        else:
            assert row["domain_loss"][name] is None
    assert sum(row["samples"].values()) == 8
    assert all(type(value) is int for value in row["tokens"].values())


def test_fields_that_apply_only_sometimes(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.start(None, {})
    sink.step(
        record(
            1,
            loss=float("nan"),
            domain_loss=[np.inf, np.nan, 2.0],
            skipped=True,
            probe=np.int64(0),
            fresh_quota=np.int32(5),
            loss_weight=[1.0, 2.0, 0.5],
            valid_loss=[1.0, np.nan, 3.0],
            controller_probability=[0.2, 0.3, 0.5],
            estimates={"reward": [1, 2, 3]},
        )
    )
    sink.step(record(2))
    sink.close()
    first, second = read(tmp_path / "mixture.jsonl")
    assert first["skipped"] is True
    assert (first["probe"], first["fresh_quota"]) == (0, 5)
    assert first["loss_weight"] == {"code": 1.0, "prose": 2.0, "names": 0.5}
    assert first["valid_loss"] == {"code": 1.0, "prose": None, "names": 3.0}
    assert first["controller_probability"]["names"] == 0.5
    assert first["domain_loss"] == {"code": None, "prose": None, "names": 2.0}
    assert "skipped" not in second
    assert "probe" not in second
    assert read(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_metrics_has_logged_steps_and_validations(tmp_path: Path) -> None:
    run(tmp_path, 0, 9)
    rows = read(tmp_path / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 4, 6, 8]
    assert all(
        {"step", "loss", "learning_rate", "tokens_per_second"} <= row.keys() for row in steps
    )
    assert [row["loss"] for row in steps] == [record(row["step"]).loss for row in steps]
    measured = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in measured] == [0, 5]
    assert measured[0]["valid_loss"] == {"code": 4.0, "prose": 5.0, "names": 6.0}
    assert measured[0]["average_valid_loss"] == 5.0
    assert is_logged(1, 100)
    assert is_logged(200, 100)
    assert not is_logged(201, 100)


def test_the_cost_of_mixing_is_summed_between_lines(tmp_path: Path) -> None:
    run(tmp_path, 0, 7)
    lines = [row for row in read(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in lines] == [1, 2, 4, 6]
    assert [row["overhead"]["all"] for row in lines] == [1.0, 1.0, 2.0, 2.0]
    assert [row["overhead"]["update"] for row in lines] == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert [row["overhead"]["collective"] for row in lines] == pytest.approx([0.2, 0.2, 0.4, 0.4])
    # Tokens are a fact of each step: they stand in the ledger, so that no interruption loses any.
    ledger = read(tmp_path / "mixture.jsonl")
    tokens = {row["step"]: row["extra_tokens"] for row in ledger if "extra_tokens" in row}
    assert tokens == {3: {"validation": 192}, 6: {"validation": 384}}


def test_a_cost_of_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError, match="'lunch' is no kind of cost; known: collective"):
        record(1, overhead={"lunch": 1.0})
    with pytest.raises(KeyError, match="known: collective"):
        record(1, extra_tokens={"lunch": 1})


def test_validation_extras(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.start(None, {})
    weights = {"code": 0.5, "prose": 0.25, "names": 0.25}
    sink.validation(validation(0, bits_per_byte={"code": 1.25}, weights=weights))
    sink.validation(validation(0, split="test"))
    sink.close()
    first, second = read(tmp_path / "metrics.jsonl")
    assert first["bits_per_byte"] == {"code": 1.25}
    assert first["weighted_average_valid_loss"] == 4.75
    assert first["validation/weighted_avg_lm_loss"] == 4.75
    losses = np.array(list(first["valid_loss"].values()))
    assert first["validation/avg_lm_loss"] == pytest.approx(losses.mean())
    assert first["validation/avg_ppl"] == pytest.approx(np.exp(losses).mean())
    assert first["validation/weighted_avg_ppl"] != first["validation/avg_ppl"]
    assert second["test_loss"]["names"] == 6.0
    assert "valid_loss" not in second


@pytest.mark.parametrize("died_at", [1, 4, 5, 7, 8, 11, 13, 14, 16, 18])
def test_an_interrupted_run_writes_the_same_files(tmp_path: Path, died_at: int) -> None:
    """Killed anywhere and resumed from its last checkpoint: equal but for the time fields."""
    run(tmp_path / "whole", 0, 20)
    run(tmp_path / "broken", 0, died_at, die=True, slow=3.0)
    # What stood in memory is gone; part of a line may have reached the disk.
    with (tmp_path / "broken" / "mixture.jsonl").open("ab") as file:
        file.write(b'{"step":%d,"probab' % (died_at + 1))
    run(tmp_path / "broken", died_at // 5 * 5, 20, slow=2.0)
    for name in ("metrics.jsonl", "mixture.jsonl", "samples.jsonl"):
        whole, broken = (
            [
                {key: value for key, value in row.items() if key not in TIME_FIELDS}
                for row in read(tmp_path / folder / name)
            ]
            for folder in ("whole", "broken")
        )
        assert whole == broken, name
    for name in ("mixture.jsonl", "samples.jsonl"):
        pair = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "broken")]
        assert pair[0] == pair[1]


def test_time_fields_are_all_that_the_clock_touches(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(StepRecord)}
    assert set(TIME_FIELDS) <= names
    sink = JsonlSink(tmp_path)
    sink.start(None, {})
    sink.step(
        record(1, eta_seconds=5.0, mfu=0.5, grad_norm=1.5, loss_scale=2.0, overhead={"update": 0.1})
    )
    sink.close()
    (row,) = read(tmp_path / "metrics.jsonl")
    assert set(row) - set(TIME_FIELDS) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
    }
    assert set(TIME_FIELDS) <= set(row)


def test_a_step_has_one_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, audit=True)
    sink.start(None, {})
    sink.step(record(1))
    with pytest.raises(ValueError, match="step 1 is recorded after step 1"):
        sink.step(record(1))
    sink.audit(audit(1))
    with pytest.raises(ValueError, match="samples of step 1"):
        sink.audit(audit(1))
    sink.close()


def test_a_ledger_that_ends_early_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 0, 4)
    sink = JsonlSink(tmp_path)
    with caplog.at_level(logging.WARNING):
        sink.start(10, {})
    sink.close()
    assert "ends at step 4 but the run goes on after step 10" in caplog.text


def test_samples_of_an_earlier_audit_do_not_stay(tmp_path: Path) -> None:
    run(tmp_path, 0, 6)
    sink = JsonlSink(tmp_path, audit=False)
    sink.start(3, {})
    sink.audit(audit(4))
    sink.close()
    assert [row["step"] for row in read(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_plan_arrays_become_named_samples() -> None:
    found = AuditRecord.from_plan(
        step=3,
        domains=["a", "b"],
        domain=np.array([1, 0], dtype=np.int32),
        epoch=np.array([0, 2]),
        sample=np.array([17, 4]),
    )
    assert found.samples == [["b", 0, 17], ["a", 2, 4]]
    assert json.dumps(found.samples)


def test_records_check_their_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"StepRecord.probability has shape \(2,\), expected \(3,\)"
    ):
        record(1, probability=[0.5, 0.5])
    with pytest.raises(ValueError, match="fractions"):
        record(1, tokens=[1.5, 2, 3])
    assert record(1, tokens=np.array([1.0, 2.0, 3.0])).tokens.dtype == np.int64
    assert type(record(1, loss=np.float32(1.5)).loss) is float
    assert np.isnan(ValidationRecord(step=0, valid_loss={}).average)
    assert np.isnan(validation(0).weighted_average)


def test_run_info_is_kept(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "deep" / "run")
    sink.start(None, {"method": "odm", "natural_weights": {"code": 0.5}})
    sink.close()
    info = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert info["natural_weights"]["code"] == 0.5
