"""What benchmarks share: taking turns, ratios with their spread, and results as JSON.

Contestants run turn by turn in one process (A-B-A-B), so that what else the machine does hits
all alike.  Wall seconds say what a user waits; processor seconds are what other load disturbs
least.  The figure to read is the ratio of one turn, and over many turns its median and middle half.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(
    os.environ.get("BENCHMARK_RESULTS") or Path(__file__).resolve().parents[1] / "results"
)
"""Where results go; the environment may name another folder."""
_DIGITS = 5


@dataclass
class Times:
    """Seconds of a contestant's turns.

    Attributes:
        wall: by the clock.
        processor: of all threads of this process.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def timed(
    function: Callable[[], Any], times: Times, wait: Callable[[], None] = lambda: None
) -> Any:
    """Call a function, keep what it took, and return its result.

    Args:
        function: what is measured.
        times: gets one entry more.
        wait: returns when the device has nothing left to do.
    """
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    wait()
    times.processor.append(time.process_time() - processor)
    times.wall.append(time.perf_counter() - wall)
    return result


def race(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    turns: int,
    warmup: int = 1,
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Let everyone take a turn after the other; who begins changes from turn to turn.

    Args:
        contestants: what is measured, by name.
        turns: that count.
        warmup: turns before them that do not.
        around: entered before a contestant's turn and left after it, outside the time taken.
        wait: see :func:`timed`.
    """
    names = list(contestants)
    times = {name: Times() for name in names}
    for turn in range(warmup + turns):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            with around(name):
                timed(contestants[name], times[name] if turn >= warmup else Times(), wait)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the middle half and the extremes of some figures."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {
        "median": rounded(statistics.median(ordered)),
        "low": rounded(ordered[quarter]),
        "high": rounded(ordered[-1 - quarter]),
        "least": rounded(ordered[0]),
        "most": rounded(ordered[-1]),
    }


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return the spread of ``one / other``, turn by turn."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def compared(one: Times, other: Times) -> dict[str, dict[str, float]]:
    """Return the ratios ``one / other`` by the clock and by processor time."""
    return {
        "wall": ratios(one.wall, other.wall),
        "processor": ratios(one.processor, other.processor),
    }


def shown(ratio: Mapping[str, float], digits: int = 2) -> str:
    """Return a ratio as text: ``1.21 (1.09–1.31)``, median and middle half."""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f}–{ratio['high']:.{digits}f})"


def rounded(value: float) -> float:
    """Return a figure with as many digits as mean something."""
    return float(f"{value:.{_DIGITS}g}")


def machine(*packages: str) -> dict[str, Any]:
    """Return where and when a benchmark ran, and how busy the machine was.

    Args:
        packages: whose versions matter.
    """
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": date.today().isoformat(),
        "processor": f"{os.cpu_count()}-core {platform.machine()} CPU{_model()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "python": platform.python_version(),
        "packages": versions,
        # Processes that wanted a core, on average over the last minutes, this one among them.
        "load": [rounded(value) for value in os.getloadavg()],
    }


def _model() -> str:
    """Return which processor it is, as far as the system tells: generations differ by half."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    told = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    if len(told) < 3:
        return ""
    return f" ({told['model name']}, family {told['cpu family']}, model {told['model']})"


def write(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write results as ``benchmarks/results/NAME.json``; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def write_among(
    name: str,
    command: str,
    result: Mapping[str, Any],
    key: Callable[[Mapping[str, Any]], Any],
    folder: Path = RESULTS,
) -> Path:
    """Write a result among those of other runs, in the place of an earlier one like it.

    Args:
        name: of the file, see :func:`write`.
        command: what makes the results.
        result: with its ``machine``.
        key: what results are alike by.
        folder: of the file.
    """
    path = folder / f"{name}.json"
    kept: list[Mapping[str, Any]] = []
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))["results"]
    places = [place for place, one in enumerate(kept) if key(one) == key(result)]
    start = places[0] if places else len(kept)
    kept[start : start + 1] = [result]
    content = {"benchmark": name, "command": command, "machine": result["machine"]}
    return write(name, {**content, "results": kept}, folder)
