"""Reports of studies in a real browser: they draw, they answer the mouse, and no script fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.browser import BROWSER, browse, facts
from support.compare_files import write_comparison
from support.study_files import MadeRun, sweep_runs, write_study

from megatron.experiments.report import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What a reader does: every button, every chart under the mouse, every table sorted.
READER = """
<script>
{
const seen = { charts: 0, tips: 0 };
for (const button of document.querySelectorAll("nav button, .switch button")) {
  document.contains(button) && button.click();
}
for (const svg of document.querySelectorAll(".chart svg")) {
  const target = svg.querySelector("rect[fill=transparent]") ?? svg;
  const box = target.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  target.dispatchEvent(new PointerEvent("pointermove", { ...at, bubbles: true }));
  seen.charts += 1;
  seen.tips += document.getElementById("tip")?.hidden === false;
  target.dispatchEvent(new PointerEvent("pointerleave", at));
  svg.dispatchEvent(new PointerEvent("pointerleave", at));
}
for (const head of document.querySelectorAll("th[scope=col]")) { head.click(); head.click(); }
dispatchEvent(new Event("beforeprint"));
document.documentElement.dataset.printed = document.documentElement.dataset.theme;
dispatchEvent(new Event("afterprint"));
document.documentElement.dataset.seen = seen.charts;
document.documentElement.dataset.tips = seen.tips;
}
</script>
"""


def shown(out: Path) -> dict[str, str]:
    page = write_report(out)
    page.write_text(page.read_text().replace("</body>", READER + "</body>"))
    found = facts(browse(page, out / "profile", "--dump-dom"))
    assert "errors" not in found, found["errors"]
    assert found["ready"] == "yes"
    assert found["tips"] == found["seen"] == found["charts"]
    assert found["printed"] == "light"
    return found


@pytest.mark.parametrize(
    ("count", "charts"),
    [
        (2, 3 + 1 + 2),  # mean and each domain by weight; the curves' mean and domains
        (3, 4 + 1 + 3),
        (5, 5 + 1 + 5),
    ],
)
def test_sweeps_are_drawn(tmp_path, count, charts):
    names = [f"<i>{index}" for index in range(count)]
    write_study(tmp_path, sweep_runs(names, 10, (1, 2)))
    found = shown(tmp_path)
    assert int(found["charts"]) == charts
    assert int(found["dots"]) >= 10 * (charts - count - 1)


def test_a_comparison_is_drawn(tmp_path):
    tasks = {"M2": ("a", "b"), "M3": ("a", "b", "c")}
    write_comparison(tmp_path, tasks, ["uniform", "odm", "doge"])
    # Forest, charges, sweep, curves, and a river for each of odm, doge and the oracle.
    assert int(shown(tmp_path)["charts"]) == 2 * (2 + 1 + 1 + 3) + 2 + 3


def test_rounds_and_nothing_measured_are_drawn(tmp_path):
    runs = [
        MadeRun(
            name=f"{role}-1", weights={"a": 0.5, "b": 0.5}, tags={"round": 1, "role": role}, end=100
        )
        for role in ("reference", "proxy")
    ]
    write_study(tmp_path, runs, study="doremi")
    (tmp_path / "mixture.yml").write_text(
        yaml.safe_dump({"mixing": {"weights": {"a": 0.75, "b": 0.25}}})
    )
    assert shown(tmp_path)["charts"] == "1"


def test_results_without_runs_are_drawn(tmp_path):
    point = {
        "run": "odm", "step": 40, "domains": ["a", "b"], "fidelity": 0.875, "r2": None,
        "A_star_sums": [3.0, 4.0], "A_method_sums": [1.0, 0.0],
    }  # fmt: skip
    fidelity = {"law": "L", "child_steps": 5, "points": [point], "methods": {}}
    (tmp_path / "fidelity.json").write_text(json.dumps(fidelity))
    assert shown(tmp_path)["charts"] == "2"
