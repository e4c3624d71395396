"""The report's figures and words, checked against the files they come from."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.report_runs import DOMAINS, LENGTH, NATURAL, SAMPLES, write_run

from megatron.errors import ConfigError, RunError
from megatron.monitor.report import write_report
from megatron.monitor.report.compare import compare, conditions, paired, verdicts
from megatron.monitor.report.groups import group_rows
from megatron.monitor.report.ledger import bin_limit, bin_width, read_ledger
from megatron.monitor.report.load import RunData, load_runs, short_names
from megatron.monitor.report.payload import payload, thin
from megatron.monitor.report.summary import domain_rows, percent, run_sentences, tiles

ROOT = Path(__file__).resolve().parents[3]


def load(*folders: Path) -> list[RunData]:
    return load_runs(folders)


def ledger_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "mixture.jsonl").read_text().splitlines()]


def test_figures_are_those_of_the_ledger(tmp_path: Path) -> None:
    rows = ledger_rows(write_run(tmp_path / "run"))
    (run,) = load(tmp_path / "run")
    ledger = run.ledger
    assert ledger.width == 1
    assert (run.method, run.seed, run.total_steps, run.last_step) == ("odm", 1, 60, 60)
    table = {row.name: row for row in domain_rows(run)}
    tokens = sum(sum(row["tokens"].values()) for row in rows)
    for name in DOMAINS:
        row = table[name]
        assert row.tokens == sum(r["tokens"][name] for r in rows)
        assert row.token_share == pytest.approx(row.tokens / tokens)
        assert row.realised == pytest.approx(sum(r["samples"][name] for r in rows) / 60 / SAMPLES)
        assert row.asked == pytest.approx(np.mean([r["probability"][name] for r in rows]))
        assert row.epochs == rows[-1]["epochs"][name]
        assert (row.first, row.last) == (
            rows[0]["probability"][name],
            rows[-1]["probability"][name],
        )
        assert row.change == pytest.approx(row.end / row.start - 1)
        assert row.bits_per_byte == pytest.approx(row.end / 2.5)
    assert [v.step for v in run.validations] == [0, 20, 40, 60]
    assert run.validations[1].tokens == 20 * SAMPLES * LENGTH
    np.testing.assert_allclose(run.natural_weights(), NATURAL)
    assert dict(tiles(run))["parameters"] == "1.25M"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 3000),
    count=st.integers(1, 5),
    first=st.sampled_from([1, 51]),
    seed=st.integers(0, 99),
)
def test_binning_averages_and_drops_nothing(steps: int, count: int, first: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"d{k}" for k in range(count)]
    probability = rng.dirichlet(np.ones(count), steps)
    samples = rng.integers(0, 3, (steps, count))
    loss = np.where(samples > 0, rng.normal(3, 1, (steps, count)), np.nan)
    records = (
        {
            "step": first + t,
            "probability": dict(zip(names, probability[t].tolist(), strict=True)),
            "domain_loss": {
                k: None if math.isnan(x) else x for k, x in zip(names, loss[t], strict=True)
            },
            "tokens": dict(zip(names, (samples[t] * 7).tolist(), strict=True)),
            "samples": dict(zip(names, samples[t].tolist(), strict=True)),
            "epochs": dict.fromkeys(names, (t + 1) / 10),
        }
        for t in range(steps)
    )
    ledger = read_ledger(records, first_step=first, last_step=first + steps - 1)
    assert len(ledger.edges) <= bin_limit(count)
    assert ledger.edges[-1] == first + steps - 1
    np.testing.assert_array_equal(ledger.samples, samples.sum(axis=0))
    np.testing.assert_array_equal(ledger.tokens, 7 * samples.sum(axis=0))
    np.testing.assert_array_equal(ledger.step_tokens, 7 * samples.sum(axis=1))
    begin = 0
    for i, edge in enumerate(ledger.edges):
        part = slice(begin, int(edge) - first + 1)
        np.testing.assert_allclose(ledger.probability[i], probability[part].mean(axis=0))
        for k in range(count):
            drawn = samples[part, k].sum()
            if drawn:
                mean = np.nansum(loss[part, k] * samples[part, k]) / drawn
                assert ledger.loss[i, k] == pytest.approx(mean)
                assert ledger.share[i, k] == pytest.approx(drawn / samples[part].sum())
            else:
                assert math.isnan(ledger.loss[i, k])
        assert ledger.epochs[i, 0] == part.stop / 10
        begin = part.stop
    weights = probability * samples.sum(axis=1, keepdims=True)
    if samples.sum():
        np.testing.assert_allclose(ledger.asked, weights.sum(axis=0) / samples.sum())


def test_widths_read_well() -> None:
    assert [bin_width(n, 400) for n in (1, 400, 401, 801, 2001, 100_000)] == [1, 1, 2, 5, 10, 500]


def test_a_run_that_is_being_written_and_damaged_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    lines = (folder / "mixture.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = b'{"step": 5, "probab\n'
    lines.insert(10, lines[9])
    lines.append(b'{"step":31,"probability":{"co')
    (folder / "mixture.jsonl").write_bytes(b"".join(lines))
    (run,) = load(folder)
    assert run.last_step == 30
    assert len(run.ledger.steps) == 29
    assert sorted(run.notes) == [
        "1 lines could not be read and were left out",
        "1 lines repeat a step and were left out",
        "1 steps are missing from the ledger",
    ]
    assert dict(tiles(run))["progress"] == "step 30 of 60"
    page = write_report([folder]).read_text()
    assert "1 steps are missing from the ledger" in page


def test_domains_that_come_and_go() -> None:
    def row(step: int, **p: float) -> dict:
        return {
            "step": step,
            "probability": p,
            "domain_loss": dict.fromkeys(p, 2.0),
            "tokens": dict.fromkeys(p, 10),
            "samples": dict.fromkeys(p, 1),
            "epochs": dict.fromkeys(p, 0.5 * step),
        }

    rows = [row(1, a=0.5, b=0.5), row(2, c=0.25, a=0.75), row(3, a=1.0)]
    ledger = read_ledger(rows, first_step=1, last_step=3)
    assert ledger.domains == ("a", "b", "c")
    assert ledger.probability.tolist() == [[0.5, 0.5, 0.0], [0.75, 0.0, 0.25], [1.0, 0.0, 0.0]]
    assert ledger.tokens.tolist() == [30, 10, 10]
    assert ledger.moved.tolist() == [0.5, 0.5, 0.25]


def test_what_a_probe_holds_is_no_move_of_the_mixture() -> None:
    def row(step: int, a: float, **more: int) -> dict:
        p = {"a": a, "b": 1 - a}
        counts = dict.fromkeys(p, 1)
        return {
            "step": step,
            "probability": p,
            "domain_loss": dict.fromkeys(p, 2.0),
            "tokens": counts,
            "samples": counts,
            "epochs": dict.fromkeys(p, 0.5 * step),
            **more,
        }

    rows = [row(1, 0.875, probe=0), row(2, 0.5), row(3, 0.625), row(4, 0.125, probe=1)]
    ledger = read_ledger(rows, first_step=1, last_step=4)
    assert ledger.first.tolist() == [0.5, 0.5]
    assert ledger.last.tolist() == [0.625, 0.375]
    assert ledger.moved.tolist() == [0.125, 0.125]
    only = read_ledger(rows[:1], first_step=1, last_step=1)
    assert (only.first.tolist(), only.last.tolist()) == ([0.875, 0.125], [0.875, 0.125])


def test_what_a_domain_counts_in_the_loss() -> None:
    def row(step: int, **more: object) -> dict:
        domains = {"a": 0.5, "b": 0.5}
        return {
            "step": step,
            "probability": domains,
            "domain_loss": domains,
            "tokens": {"a": 30, "b": 10},
            "samples": {"a": 3, "b": 1},
            "epochs": domains,
            **more,
        }

    rows = [row(1, loss_weight={"a": 1.0, "b": 9.0}), row(2)]
    ledger = read_ledger(rows, first_step=1, last_step=2)
    assert ledger.weighed is not None
    # 30 × 1 against 10 × 9 tokens; where nothing is said, tokens count alike.
    assert ledger.weighed.tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert read_ledger([row(1)], first_step=1, last_step=1).weighed is None


def test_natural_weights_without_being_told(tmp_path: Path) -> None:
    (run,) = load(write_run(tmp_path / "run", info=False))
    np.testing.assert_allclose(run.natural_weights(), NATURAL)


def test_sentences_about_one_run(tmp_path: Path) -> None:
    (run,) = load(write_run(tmp_path / "odm"))
    text = " ".join(run_sentences(run, domain_rows(run)))
    assert "over 3 domains went from 6.1" in text
    assert "at step 60 (−49.2%)" in text
    assert "Every domain improved, code the most (−50.0%)" in text
    assert "The mixture moved: code the most, up to 20 points" in text
    assert "What was drawn follows what was asked" in text
    (still,) = load(write_run(tmp_path / "still", method="static", planned=-60))
    text = " ".join(run_sentences(still, domain_rows(still)))
    assert "The sampling probabilities stayed as they were" in text
    assert "3 of 3 domains got worse: code +50.0%" in text
    (young,) = load(write_run(tmp_path / "young", steps=5))
    assert "measured only once" in run_sentences(young, domain_rows(young))[0]


def test_runs_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    long = write_run(tmp_path / "odm", steps=60)
    short = write_run(tmp_path / "plain", method="static", steps=45, gain=0.3)
    runs = load(long, short)
    result = compare(runs)
    assert result is not None
    assert result.baseline == 1
    assert [v.step for v in result.at] == [40, 40]
    assert not result.unequal
    (verdict,) = verdicts(result)
    assert verdict.startswith("With one run each, odm ended higher than plain: +0.2")
    assert "lower on 0 of 3 domains" in verdict
    assert any("says nothing about chance" in text for text in conditions(result))
    assert compare(runs, "odm").baseline == 0  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="no run is called 'plan'; did you mean 'plain'"):
        compare(runs, "plan")
    assert compare(runs[:1]) is None


def test_seeds_are_paired_and_give_an_interval(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, gain=gain)
        for method, gain in (("odm", 0.1), ("static", 0.0))
        for seed in (1, 2, 3)
    ]
    result = compare(load(*folders))
    assert result is not None
    assert result.labels == ("odm", "static uniform")
    assert result.against == (3, 4, 5, None, None, None)
    # The seeds' own noise is the same in both and falls out of the paired differences.
    assert result.paired[0].mean == pytest.approx(-0.1, abs=1e-9)
    (verdict,) = verdicts(result)
    assert verdict.startswith("odm is better than static uniform: −0.1000 nats per token")
    assert "over 3 seeds" in verdict
    assert not any("chance" in text for text in conditions(result))


def test_an_interval_over_zero_is_no_difference(tmp_path: Path) -> None:
    gains = {1: 0.05, 2: -0.06, 3: 0.02}
    folders = [
        write_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, gain=gain)
        for seed in gains
        for method, gain in (("odm", gains[seed]), ("static", 0.0))
    ]
    result = compare(load(*folders))
    assert result is not None
    assert verdicts(result)[0].startswith("odm and static uniform cannot be told apart")


def test_the_t_interval() -> None:
    result = paired([1.0, 2.0, 4.0])
    assert result.mean == pytest.approx(7 / 3)
    assert result.half_width == pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert math.isnan(paired([1.0]).half_width)


def test_without_a_common_measurement_nothing_is_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    other = write_run(tmp_path / "b", domains=("x", "y"))
    assert compare(load(first, other)) is None
    page = write_report([first, other], tmp_path / "r.html").read_text()
    assert "cannot be compared yet" in page


class Outside(HTMLParser):
    """Collects what a page would fetch, and the text of its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "data")
        ]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "run")])
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.fetched == ["link data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert set(re.findall(r"https?://[^\"'\s<)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert page.count("<table") == 2
    assert not list(path.parent.glob("*.tmp"))


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = ("</script><script>alert(1)</script>", "{{DATA}}", 'a"b<c>&')
    path = write_report([write_run(tmp_path / "run", domains=evil)])
    page = path.read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert page.count("{{DATA}}") >= 2  # in its table row and in the data, replaced nowhere
    start = page.index('id="data">') + len('id="data">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert data["domains"] == list(evil)


def test_payload_is_bounded_and_finite(tmp_path: Path) -> None:
    runs = load(write_run(tmp_path / "run", steps=900, planned=900))
    data = json.loads(payload(runs, [0]), parse_constant=pytest.fail)
    (run,) = data["runs"]
    assert run["width"] == 5
    assert len(run["steps"]) == len(run["loss"]) == len(run["probability"][0]) == 180
    assert run["tokens"][-1] == 900 * SAMPLES * LENGTH
    assert run["low"][0] <= run["loss"][0] <= run["high"][0]
    assert run["metrics"]["tokens_per_second"][-1] == pytest.approx(1900, abs=10)
    assert data["against"] == [None]
    assert thin(list(range(1000)))[0] == 0
    assert thin(list(range(1000)))[-1] == 999
    assert len(thin(list(range(1000)))) == 400


def test_names_of_runs() -> None:
    paths = [Path("/a/x/run"), Path("/a/y/run")]
    assert short_names(paths) == ["x/run", "y/run"]
    assert short_names([Path("/a/run")]) == ["run"]
    assert short_names([Path("/a/run"), Path("/a/run")]) == ["run", "run (2)"]
    assert percent(float("nan")) == "–"
    assert percent(-0.0012) == "−0.12%"


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    first = write_run(tmp_path / "odm")
    other = write_run(tmp_path / "plain", method="static")
    output = tmp_path / "deep" / "both.html"
    done = report(str(first), str(other), "-o", str(output), "--baseline", "plain")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(output)
    assert "With one run each, odm and plain ended alike" in output.read_text()


@pytest.mark.parametrize("case", ["missing", "file", "empty", "parent", "young", "foreign"])
def test_what_is_no_run_gets_one_message(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "here"
    if case == "file":
        folder.touch()
    elif case != "missing":
        folder.mkdir()
    if case == "parent":
        write_run(folder / "inner")
    elif case == "young":
        (folder / "mixture.jsonl").write_text('{"step": 1, "pro')
    elif case == "foreign":
        (folder / "mixture.jsonl").write_text('{"step": 1, "x": 2}\n')
    message = {
        "missing": "does not exist; give the run folder",
        "file": "is a file; give the run folder",
        "empty": "is not a run folder: it holds no mixture.jsonl",
        "parent": f"there are runs inside it: {folder / 'inner'}",
        "young": "no step has been recorded yet",
        "foreign": "none of its 1 records is a step's",
    }[case]
    done = report(str(folder))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (tmp_path / "blocked").touch()
    with pytest.raises(RunError, match="the report cannot be written"):
        write_report([folder], tmp_path / "blocked" / "r.html")


def test_a_trifle_is_not_a_difference(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", method="static", gain=1e-6)]
    result = compare(load(*folders))
    assert result is not None
    assert verdicts(result)[0].startswith("With one run each, a and b ended alike: +0.0000")
    assert "lower on 0 of 3" in verdicts(result)[0]
    page = write_report(folders).read_text()
    table = page[page.index('id="comparison"') : page.index("</table>")]
    assert 'class="less"' not in table
    assert 'class="more"' not in table


def test_groups_have_a_table_where_there_are_groups(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = write_report([folder]).read_text(encoding="utf-8")
    assert 'class="sortable groups"' not in page
    path = folder / "config.yml"
    config = yaml.safe_load(path.read_text()) if path.exists() else {}
    first, second, *others = DOMAINS
    mixing = {**(config.get("mixing") or {}), "groups": {"members": {"some": [first, second]}}}
    path.write_text(yaml.safe_dump({**config, "mixing": mixing}))
    (run,) = load(folder)
    rows = {row.name: row for row in domain_rows(run)}
    groups = {row.name: row for row in group_rows(run, list(rows.values()))}
    assert list(groups) == ["some", *others]
    assert groups[others[0]] == rows[others[0]]
    some, parts = groups["some"], [rows[first], rows[second]]
    for name in ("first", "last", "asked", "realised", "token_share", "tokens"):
        assert getattr(some, name) == pytest.approx(sum(getattr(row, name) for row in parts))
    assert some.end == pytest.approx(
        sum(row.asked * row.end for row in parts) / sum(row.asked for row in parts)
    )
    sizes = [row.realised / row.epochs for row in parts]
    assert some.epochs == pytest.approx(sum(row.realised for row in parts) / sum(sizes))
    page = write_report([folder]).read_text(encoding="utf-8")
    assert 'class="sortable groups"' in page
    assert '<th scope="row">some</th>' in page
