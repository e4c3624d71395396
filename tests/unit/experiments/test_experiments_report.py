"""A study's report: well-formed, alone, and its numbers are those of the files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.compare_files import write_comparison
from support.study_files import STEPS, TOKENS, MadeRun, sweep_runs, write_study

from megatron.errors import RunError
from megatron.experiments.commands import report as command
from megatron.experiments.points import point_results
from megatron.experiments.report import write_report
from megatron.experiments.report.comparison import charged
from megatron.experiments.report.curves import (
    MOST_NUMBERS,
    MOST_RUNS,
    drawn,
    family_data,
    points_each,
    thin,
)
from megatron.experiments.report.entries import families, run_ends
from megatron.experiments.report.files import beside, load_study
from megatron.experiments.report.head import missing, tiles
from megatron.experiments.report.law import law_data
from megatron.experiments.report.tables import sentences

EVIL = '<b>"x"</b>'
DOMAINS = ("code", "prose", EVIL)
VOID = {"meta", "link", "br", "input"}


class Page(HTMLParser):
    """A page's elements in order; complains where they do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> dict[str, dict[str, str]]:
        """Return the first table with such heads: cells by row's and column's name."""
        for head, *rows in self.tables:
            if set(heads) <= set(head):
                return {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        raise AssertionError(heads)


def opened(path: Path) -> tuple[Page, dict]:
    text = path.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)], parse_constant=pytest.fail)
    page = Page(text)
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert all(link == "data:," or link.startswith("./") for link in page.links)
    assert page.tags.count("script") == 2
    assert EVIL not in text
    return page, data


@pytest.fixture
def sweep(tmp_path):
    runs = sweep_runs(DOMAINS, 12, (1, 2))
    lost = [MadeRun(name="point-12-seed-1", weights=runs[0].weights, tags={"point": 12})]
    rows = write_study(tmp_path / "sweep", runs, lost=lost)
    return tmp_path / "sweep", rows


def test_the_figures_of_a_sweep_are_those_of_its_table(sweep):
    out, rows = sweep
    page, data = opened(write_report(out))
    table = page.table("mean loss", "runs")
    results = point_results(rows)
    assert list(table) == [f"point {result.point}" for result in results]
    for result in results:
        row = table[f"point {result.point}"]
        assert row["mean loss"] == f"{result.mean:.4f}"
        assert row["sd"] == f"{result.deviation:.4f}"
        for name in DOMAINS:
            assert row[f"{name}weight"] == f"{result.weights[name]:.4g}"
            assert row[f"{name}loss"] == f"{result.losses[name]:.4f}"
    (family,) = data["families"]
    assert family["domains"] == list(DOMAINS)
    best = family["entries"][0]
    assert best["mean"] == pytest.approx(results[0].mean, rel=1e-6)
    assert best["weights"] == pytest.approx(list(results[0].weights.values()), rel=1e-4)
    curve = family["curves"][0]
    assert curve["steps"] == list(STEPS)
    assert curve["tokens"] == [step * TOKENS for step in STEPS]
    mine = [row for row in rows if row["run"] == curve["name"] and row["domain"] == "prose"]
    assert curve["loss"][1] == pytest.approx([row["loss"] for row in mine], rel=1e-5)
    assert f"point {results[0].point}, {results[0].mean:.4f}" in "".join(page.text)


def test_the_head_says_what_it_took_and_what_failed(sweep):
    out, _ = sweep
    why = {"point-12-seed-1": "exit code 1 <oops>"}
    page, _ = opened(write_report(out, command=["tools/mix.py", "sweep", "a b"], failed=why))
    text = "".join(page.text)
    assert "tools/mix.py sweep 'a b'" in text
    assert "point-12-seed-1: exit code 1 <oops>" in text
    assert "numpy " in text
    assert " cores" in text
    assert "UTC" in text
    study = load_study(out)
    told = dict(tiles(study, run_ends(study.rows)))
    assert told["runs ended"] == "24 of 25"
    assert told["tokens"] == "25.6M"
    assert float(told["training FLOPs (causal attention)"]) == pytest.approx(25 * 2.56e12, rel=1e-3)
    assert told["seeds"] == "0, 1, 2"
    # Made again, the note stays; what is only missing is told of too.
    assert "exit code 1 <oops>" in "".join(opened(write_report(out))[0].text)
    (out / "made.json").unlink()
    assert "no held-out loss" in missing(load_study(out))["point-12-seed-1"]


def test_runs_that_lie_beside_are_linked(sweep):
    out, _ = sweep
    runs = out.parent / "runs"
    (runs / "key-point-00-seed-1").mkdir(parents=True)
    (runs / "key-point-01-seed-2").mkdir()
    (runs / "key-point-01-seed-2" / "report.html").write_text("")
    page, _ = opened(write_report(out))
    links = set(page.links) - {"data:,"}
    assert links == {
        "./../runs/key-point-00-seed-1/",
        "./../runs/key-point-01-seed-2/report.html",
    }
    assert beside(out, out.parent / "nowhere") is None


def test_unmeasured_losses_break_nothing(tmp_path):
    def losses(weights, step, names):
        return dict.fromkeys(
            names, math.nan if weights[names[0]] > 0.5 else 2.0 + weights[names[0]]
        )

    write_study(tmp_path, sweep_runs(("a", "b"), 9), losses=losses)
    page, data = opened(write_report(tmp_path))
    table = page.table("mean loss")
    shown = [row["mean loss"] for row in table.values()]
    assert "–" in shown
    assert shown[0] != "–"
    assert shown == sorted(shown, key=lambda text: (text == "–", text))
    entries = data["families"][0]["entries"]
    assert any(entry["mean"] is None for entry in entries)
    assert entries[0]["mean"] is not None

    write_study(
        tmp_path / "none",
        sweep_runs(("a", "b"), 3),
        losses=lambda w, s, n: dict.fromkeys(n, math.nan),
    )
    assert "none is the best" in "".join(opened(write_report(tmp_path / "none"))[0].text)


def test_a_study_none_of_whose_runs_has_ended(tmp_path):
    runs = [MadeRun(name="only", weights={"a": 1.0}, end=200)]
    write_study(tmp_path, runs)
    page, data = opened(write_report(tmp_path))
    assert data["families"] == []
    assert "only" in "".join(page.text)
    (tmp_path / "table.csv").unlink()
    opened(write_report(tmp_path))


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no study"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(RunError, match=r"plan\.json cannot be read"):
        write_report(tmp_path)


def test_many_runs_are_thinned_out(tmp_path):
    rows = write_study(tmp_path, sweep_runs(("a", "b"), MOST_RUNS + 50))
    (family,) = families(run_ends(rows))
    shown = drawn(family.entries)
    assert len(shown) <= MOST_RUNS
    assert shown[:50] == list(family.entries[:50])
    assert shown[-1] == family.entries[-1]
    page, data = opened(write_report(tmp_path))
    assert len(data["families"][0]["curves"]) == len(shown)
    assert f"{len(shown)} of {MOST_RUNS + 50} mixtures" in "".join(page.text)


def test_many_domains_are_thinned_out(tmp_path):
    names = [f"domain-{index}" for index in range(61)]
    rows = write_study(tmp_path, sweep_runs(names, 8))
    (family,) = families(run_ends(rows))
    data = family_data(family, rows)
    assert len(data["domains"]) == 60
    numbers = sum(len(curve["steps"]) * (len(curve["loss"]) + 3) for curve in data["curves"])
    assert numbers < 1.5 * MOST_NUMBERS
    page, _ = opened(write_report(tmp_path))
    assert (tmp_path / "report.html").stat().st_size < 300_000
    assert "table.csv has all" in "".join(page.text)


def test_long_curves_are_thinned_out():
    assert points_each(1) == 200
    assert points_each(10**6) == 6
    assert thin(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert thin([1, 2, 3], 5) == [1, 2, 3]


def test_weights_that_move_are_drawn_between_validations(tmp_path):
    def so_far(step):
        return {"a": 0.5 + 0.25 * step / STEPS[-1], "b": 0.5 - 0.25 * step / STEPS[-1]}

    runs = [
        MadeRun(name="odm", method="odm", weights=so_far(0), moving=so_far),
        MadeRun(name="static", weights={"a": 0.5, "b": 0.5}),
    ]
    rows = write_study(tmp_path, runs)
    (family,) = families(run_ends(rows))
    curves = {curve["name"]: curve for curve in family_data(family, rows)["curves"]}
    assert curves["static"]["weights"] is None
    # The mean so far rises by 0.25 over the run: between two steps it is f + step * f'.
    ends = np.array(STEPS, dtype=float)
    means = np.array([so_far(step)["a"] for step in STEPS])
    expected = np.diff(ends * means) / np.diff(ends)
    assert curves["odm"]["weights"][0] == pytest.approx([0.5, *expected], abs=1e-4)


def test_a_law_is_shown_beside_what_was_measured(tmp_path):
    facts = {
        "form": "loss_i(p) = c_i + exp(-sum_j A_ij p_j)", "runs": 2, "domains": ["a", EVIL],
        "measured": ["a", EVIL], "c": [1.0, 2.0], "A": [[1.0, 0.0], [0.0, 2.0]],
        "r2": [0.99, -math.inf], "r2_held_out": None, "confidence": 0.95, "mixture": [0.3, 0.7],
        "mixture_low": [0.2, 0.6], "mixture_high": [0.4, 0.8], "objective": 1.9,
        "objective_low": 1.8, "objective_high": 2.0, "losses": [1.74, 2.25], "best_run": 2.1,
        "fitted": [
            {"run": "one", "mixture": [1.0, 0.0], "losses": [1.4, 3.0]},
            {"run": "two", "mixture": [0.0, 1.0], "losses": [2.0, 2.1]},
        ],
    }  # fmt: skip
    (tmp_path / "law.json").write_text(json.dumps(facts))
    page, data = opened(write_report(tmp_path))
    assert page.table("weight", "low")[EVIL]["high"] == "0.8000"
    row = page.table("measured", "R²")[EVIL]
    assert (row["R²"], row["R² of runs left out"]) == ("–", "–")
    law = data["law"]
    assert law["actual"] == [[1.4, 2.0], [3.0, 2.1]]
    assert law["predicted"][0] == pytest.approx([1 + math.exp(-1), 2.0])
    assert law["curve"][1][0] == pytest.approx(2 + math.exp(-2))
    assert law_data({**facts, "fitted": []})["actual"] == [[], []]


def test_rounds_are_shown_in_order(tmp_path):
    course = [{"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.4}, {"a": 0.65, "b": 0.35}]
    runs = [
        MadeRun(
            name=f"{role}-{number}",
            weights=course[number - 1],
            method="static" if role == "reference" else "doremi",
            tags={"round": number, "role": role},
        )
        for number in (1, 2)
        for role in ("reference", "proxy")
    ]
    write_study(tmp_path, runs, study="doremi")
    (tmp_path / "mixture.yml").write_text(yaml.safe_dump({"mixing": {"weights": course[2]}}))
    page, data = opened(write_report(tmp_path))
    assert data["rounds"] == {
        "domains": ["a", "b"],
        "weights": [[0.5, 0.6, 0.65], [0.5, 0.4, 0.35]],
    }
    assert page.table("round")["2"]["b"] == "0.3500"
    assert "Found in 2 rounds: a 0.65, b 0.35." in "".join(page.text)


def test_a_comparison_is_shown_task_by_task(tmp_path):
    methods = ["uniform", "odm", "doge<i>"]
    facts = write_comparison(tmp_path, {"M2": ("a", "b"), "M3": DOMAINS}, methods)
    facts["tasks"]["M3"]["left_out"] = {"15": ["odm: its loss is not finite"]}
    (tmp_path / "compare.json").write_text(json.dumps(facts))
    page, data = opened(write_report(tmp_path))
    assert [task["name"] for task in data["tasks"]] == ["M2", "M3"]
    text = "".join(page.text)
    assert "Seed 15 is left out of every method: odm: its loss is not finite." in text
    table = page.table("p Holm", "wins")
    for name in methods[1:]:
        found = facts["tasks"]["M2"]["methods"][name]["difference"]["average"]
        row = table[name]
        assert row["difference"] == f"{found['mean']:+.4f}".replace("-", "−")
        assert row["p Holm"] == f"{found['p_holm']:.3g}"
        assert row["wins"] == f"{found['wins']} of 5"
        regret = facts["tasks"]["M2"]["methods"][name]["regret"]["average"]["mean"]
        assert row["regret"] == f"{regret:+.4f}".replace("-", "−")
        drawn_difference = data["tasks"][0]["methods"][methods.index(name)]["differences"][
            "average"
        ]
        assert drawn_difference["mean"] == pytest.approx(found["mean"], rel=1e-4)
        assert drawn_difference["interval"] == pytest.approx(found["interval"], rel=1e-4)
    spent = facts["tasks"]["M2"]["methods"]["odm"]["spent"]
    assert sum(charged(spent).values()) == pytest.approx(spent["total"])
    # The runs that count alone are drawn, and the baseline's own row has no test.
    assert [entry["name"] for entry in data["families"][1]["entries"]] == [*methods, "oracle"]
    assert table["uniform baseline"]["p"] == ""


def test_a_comparison_without_a_test(tmp_path):
    facts = write_comparison(tmp_path, {"M2": ("a", "b")}, ["uniform", "odm"])
    task = facts["tasks"]["M2"]
    task |= {"seeds": [], "objectives": [], "oracle": None}
    for one in task["methods"].values():
        one |= dict.fromkeys(("mean", "difference_by_domain", "regret", "spent"))
        one |= {"difference": {}, "by_seed": {}, "time_ratio": None}
    (tmp_path / "compare.json").write_text(json.dumps(facts))
    page, data = opened(write_report(tmp_path))
    assert "no test and no interval" in "".join(page.text)
    assert data["families"][0]["entries"] == []


def test_regmix_graph_and_fidelity_have_sections(tmp_path):
    regmix = {
        "regressor": "trees", "mixtures": 9, "measured": ["a", EVIL], "best": 4, "simulated": 100,
        "rank_correlation": {"trees": {"objective": 0.5, "domains": {"a": 0.25, EVIL: 0.75}}},
        "held_out": [{"run": "one", "measured": 2.5, "predicted": {"trees": 2.25}}],
        "mixture": {"a": 0.25, EVIL: 0.75}, "spread": {"a": 0.05, EVIL: 0.05}, "value": 2.0,
        "value_of_even": 2.125, "best_proxy": {"run": "two", "value": 2.0625},
        "warnings": ["Low <r>."],
    }  # fmt: skip
    point = {
        "run": "odm-seed-1", "method": "odm", "seed": 1, "step": 40, "domains": ["a", EVIL],
        "fidelity": 0.875, "r2": [0.9, 0.8], "A_star_sums": [3.0, 4.0], "A_method_sums": [1.0, 0.0],
    }  # fmt: skip
    without = {**point, "step": 80, "fidelity": None, "r2": None, "A_method_sums": None}
    fidelity = {
        "law": "L", "child_steps": 5, "points": [point, without],
        "methods": {"odm": {"fidelity": 0.875, "points": 2, "with_estimate": 1}},
    }  # fmt: skip
    graph = {"a": {"a": 0.5, EVIL: -0.125}, EVIL: {"a": 0.25, EVIL: 0.5}}
    for name, facts in (("regmix", regmix), ("fidelity", fidelity), ("graph", graph)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(facts))
    page, data = opened(write_report(tmp_path / "regmix"))
    assert page.table("regressor")["trees"] == {
        "regressor": "trees",
        "objective": "0.500",
        "a": "0.250",
        EVIL: "0.750",
    }
    assert "Low <r>." in "".join(page.text)
    (found, ranks) = data["figures"]["regression"]
    assert found["rows"][1] == {"name": EVIL, "value": 0.75, "low": 0.7, "high": 0.8}
    assert ranks["points"] == [{"name": "one", "x": 2.25, "y": 2.5}]
    page, data = opened(write_report(tmp_path / "fidelity"))
    assert page.table("mean fidelity")["odm"]["mean fidelity"] == "0.875"
    assert page.table("run", "step", "R²")["odm-seed-1"]["fidelity"] == "–"  # the last of its rows
    course, sums = data["figures"]["fidelity"]
    assert course["series"] == [{"name": "odm-seed-1", "x": [40.0, 80.0], "y": [0.875, None]}]
    assert sums["points"] == [{"name": "a", "x": 0.6, "y": 1.0}, {"name": EVIL, "x": 0.8, "y": 0.0}]
    page, _ = opened(write_report(tmp_path / "graph"))
    assert page.table("trained on")["a"][EVIL] == "−0.1250"
    assert f"{EVIL} helps a the most: 25.0%" in "".join(page.text)


def test_other_references_make_no_rounds(tmp_path):
    tags = {"task": "M2", "contestant": "doremi", "role": "reference", "number": 0}
    write_study(tmp_path, [MadeRun(name="one", weights={"a": 0.5, "b": 0.5}, tags=tags)])
    assert opened(write_report(tmp_path))[1]["rounds"] is None


def test_children_are_not_ranked_with_their_parents(tmp_path):
    runs = [
        MadeRun(name="odm-seed-1", weights={"a": 0.5, "b": 0.5}, tags={"role": "parent"}),
        MadeRun(name="odm-seed-1-child", weights={"a": 1.0, "b": 0.0}, tags={"role": "child"}),
    ]
    rows = write_study(tmp_path, runs)
    (family,) = families(run_ends(rows))
    assert [entry.label for entry in family.entries] == ["odm"]
    assert missing(load_study(tmp_path)) == {}


def test_what_is_said_of_the_best(sweep):
    _, rows = sweep
    (family,) = families(run_ends(rows))
    main, rest = sentences(family)
    results = point_results(rows)
    gap = results[1].mean - results[0].mean
    assert any(f"Next is point {results[1].point}, +{gap:.4f}" in line for line in rest)
    even = next(result for result in results if result.point == 0)
    assert main[0].startswith(f"Lowest mean held-out loss: point {results[0].point},")
    if even is not results[0]:
        assert any("Even weights (point 0)" in line for line in rest)


def test_the_command_makes_it_again(sweep, capsys):
    import argparse

    out, _ = sweep
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(out)])) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert (out / "report.html").exists()
