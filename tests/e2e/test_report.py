"""The report in a real browser: it draws, it answers the mouse, and no script fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import BROWSER, browse, facts
from support.report_runs import evaluated, write_run

from megatron.monitor.jsonl import EVALUATIONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What a reader does: every button, every chart under the mouse, every table sorted, a filter.
READER = """
<script>
{
const count = () => document.querySelectorAll(".chart svg").length;
const seen = { tips: 0, least: count() };
for (const button of document.querySelectorAll("nav button, .switch button")) {
  document.contains(button) && button.click();
}
for (const name of ["runs", "switch"]) {
  for (let i = 0; i < document.querySelectorAll("." + name + " button").length; i++) {
    document.querySelectorAll("." + name + " button")[i].click();
    seen.least = Math.min(seen.least, count());
  }
}
document.querySelectorAll(".run[aria-pressed=false]").forEach((chip) => chip.click());
for (const svg of document.querySelectorAll(".chart svg")) {
  const box = svg.getBoundingClientRect();
  const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip");
  if (tip && !tip.hidden && tip.querySelectorAll("div").length) seen.tips += 1;
  svg.dispatchEvent(new PointerEvent("pointerleave", at));
}
for (const head of document.querySelectorAll("th[scope=col]")) { head.click(); head.click(); }
document.documentElement.dataset.after = count();
const search = document.querySelector("input[type=search]");
if (search) { search.value = "domain-1"; search.dispatchEvent(new Event("input")); }
document.documentElement.dataset.tips = seen.tips;
document.documentElement.dataset.least = seen.least;
document.documentElement.dataset.filtered = document.querySelectorAll("#share-grid figure").length;
}
</script>
"""


def make_report(*arguments: Path | str) -> None:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def test_one_run_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / EVALUATIONS).write_text(evaluated(40) + evaluated(60, shots=5), encoding="utf-8")
    make_report(run)
    found = facts(browse(run / "report.html", tmp_path / "profile", "--dump-dom"))
    assert "errors" not in found, found["errors"]
    assert found["ready"] == "yes"
    # Two losses, three domains twice, one river, two of the pace.
    assert found["charts"] == "11"
    assert int(found["lines"]) >= 2 + 2 * 3 + 3 + 2


def test_everything_can_be_used(tmp_path: Path) -> None:
    names = tuple(f"domain-{i}" for i in range(12))
    runs = [
        write_run(tmp_path / name, method=method, steps=steps, domains=names)
        for name, method, steps in (("odm", "odm", 900), ("plain", "static", 700))
    ]
    page = tmp_path / "both.html"
    make_report(*runs, "-o", page)
    text = page.read_text()
    page.write_text(text.replace("</body>", READER + "</body>"))
    found = facts(browse(page, tmp_path / "profile", "--dump-dom"))
    assert "errors" not in found, found["errors"]
    assert found["after"] == "31"  # three losses, 12 domains twice, two rivers, two of the pace
    assert found["tips"] == found["after"]
    assert int(found["least"]) < 31  # runs can be hidden, all of them too
    assert found["filtered"] == "3"  # domain-1, domain-10, domain-11


def test_a_run_with_nothing_measured_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").unlink()
    make_report(run)
    document = browse(run / "report.html", tmp_path / "profile", "--dump-dom")
    found = facts(document)
    assert "errors" not in found, found["errors"]
    assert found["ready"] == "yes"
    assert "nothing recorded" in document


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_not_empty(tmp_path: Path, theme: str) -> None:
    image = pytest.importorskip("PIL.Image")
    run = write_run(tmp_path / "run")
    make_report(run)
    page = run / "report.html"
    text = page.read_text().replace('<html lang="en">', f'<html lang="en" data-test="{theme}">')
    page.write_text(text.replace("location.hash", f'"#theme={theme}"'))
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", "--hide-scrollbars")
    pixels = image.open(picture).convert("RGB")
    colors = {color for _, color in pixels.getcolors(maxcolors=1 << 24)}
    background = pixels.getpixel((3, 3))
    assert (sum(background) < 200) == (theme == "dark")
    assert len(colors) > 100
