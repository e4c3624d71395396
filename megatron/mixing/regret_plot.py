"""The plot of the documentation: how methods approach the best fixed mixture, as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron.mixing.regret import Entry

Points = list[tuple[float, float]]

SHOWN: Final = (
    ("static (uniform)", "#767676"),
    ("odm", "#b4610a"),
    ("ado", "#6d3bbf"),
    ("dynamic_loading (best's losses)", "#0a7f55"),
    ("skillit (identity)", "#5aa9e6"),
    ("skillit (true graph)", "#0b57a4"),
    ("aioli", "#c2185b"),
)
_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 250, 40, 50


def plot(entries: Sequence[Entry], *, world: str) -> str:
    """Return an SVG of the mean loss above the best fixed mixture's at the end, by step.

    Args:
        entries: what was compared; those of :data:`SHOWN` are drawn.
        world: the world to show.
    """
    chosen = {entry.label: entry for entry in entries if entry.world == world}
    curves = {
        label: (_thinned(chosen[label]), colour) for label, colour in SHOWN if label in chosen
    }
    values = [y for points, _ in curves.values() for _, y in points]
    steps = [x for points, _ in curves.values() for x, _ in points]
    x = _Axis(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(max(min(values), 1e-4), max(values), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        'aria-label="Mean loss above that of the best fixed mixture, by step">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">Mean loss above the best that a fixed mixture '
        f"ends with (world: {world})</text>",
        *_grid(x, y),
    ]
    labels = _spread([y.at(points[-1][1]) for points, _ in curves.values()])
    for (label, (points, colour)), place in zip(curves.items(), labels, strict=True):
        path = " ".join(f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{place + 4:.1f}" fill="{colour}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """A logarithmic axis from numbers to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self._start, self._end = low, high, start, end

    def at(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        marks = [m * 10.0**power for power in range(first, last + 1) for m in (1, 3)]
        return [mark for mark in marks if self.low <= mark <= self.high]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for mark in x.ticks():
        at = f"{x.at(mark):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{mark:,.0f}</text>')
    for mark in y.ticks():
        at = f"{y.at(mark):.1f}"
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}" stroke="#e2e2e2"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at}" dy="4" text-anchor="end">{mark:g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">')
    parts[-1] += "step</text>"
    parts.append(
        f'<text transform="translate(18 {(_TOP + bottom) / 2}) rotate(-90)" '
        'text-anchor="middle">nats per token</text>'
    )
    return parts


def _thinned(entry: Entry) -> Points:
    """Return about a hundred points, evenly spaced on a logarithmic axis of steps."""
    steps: npt.NDArray[np.int64] = entry.run.steps
    marks = np.geomspace(max(int(steps[0]), 100), int(steps[-1]), 100)
    rows = np.unique(np.minimum(np.searchsorted(steps, marks), len(steps) - 1))
    above = entry.run.losses.mean(axis=1) - entry.best.value
    return [(float(steps[row]), float(above[row])) for row in rows]


def _spread(places: Sequence[float], gap: float = 15.0) -> list[float]:
    """Move labels apart that would overlap, keeping their order."""
    order = np.argsort(places, kind="stable")
    moved = [float(place) for place in places]
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    overshoot = moved[order[-1]] - (_HEIGHT - _BOTTOM + 20)
    return [place - max(overshoot, 0.0) for place in moved]
