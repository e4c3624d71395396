"""Figures of a fit: performance against compute, and the selectors at one budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from megatron.selection.base import FloatArray
from megatron.selection.break_even import SHARES
from megatron.selection.cost_model import size_name
from megatron.selection.figures import (
    GRID,
    INK,
    SOFT,
    Look,
    Picture,
    legend_below,
    looks,
    panels,
    png,
)
from megatron.selection.gain_law import gain
from megatron.selection.gains import Gain, Gains, methods_of, sizes_of

_POINTS: Final = 200


def pareto_front(flops: FloatArray, performance: FloatArray, sign: float) -> list[int]:
    """Return which runs no other beats at as little compute, cheapest first.

    Args:
        flops: of the runs, [n].
        performance: of the runs, [n].
        sign: 1 where higher is better, else -1.
    """
    order = np.lexsort((-sign * performance, flops))
    front: list[int] = []
    best = -np.inf
    for index in order:
        if sign * performance[index] > best:
            best = sign * performance[index]
            front.append(int(index))
    return front


def spent(one: Gain, compute: str) -> FloatArray:
    """Return choosing and training together of a law's runs, [n]."""
    return one.flops if compute == "total" else one.flops + one.choosing


def performance_figure(gains: Gains, task: str) -> Picture:
    """Draw what was measured against all compute, the fitted curves, and the Pareto front."""
    laws = gains.of(task)
    sizes, look = sizes_of(laws), looks(methods_of(laws))
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    with panels(columns, rows, width=4.6 if columns > 1 else 6.4, height=3.7) as (figure, axes):
        for axis, size in zip(axes.flat, sizes, strict=False):
            mine = [one for one in laws if one.size == size]
            _performance(axis, mine, gains, look)
            axis.set_title(f"{size_name(size)} parameters")
            axis.set_xlabel("compute, choosing and training (FLOPs)")
        for row in axes:
            row[0].set_ylabel(gains.unit)
        for axis in axes.flat[len(sizes) :]:
            axis.set_visible(False)
        legend_below(figure, axes.flat[0], columns=3 * columns + 2)
        picture = png(figure)
    return Picture(
        name=f"performance-{file_name(task)}",
        title=f"Performance against compute: {task}",
        text="Points are runs, lines the fitted laws (dashed beyond the runs' compute), shifted by "
        "what choosing costs. Ringed runs are on the Pareto front: no cheaper run is as good.",
        png=picture,
        columns=columns,
    )


def _performance(axis: Any, mine: Sequence[Gain], gains: Gains, look: dict[str, Look]) -> None:
    axis.set_xscale("log")
    xs, ys = [], []
    for one in mine:
        style = look[one.method]
        trained = one.flops > 0
        x, y = spent(one, gains.compute)[trained], one.performance[trained]
        xs.append(x)
        ys.append(y)
        axis.plot(
            x, y, style.marker, color=style.color, ms=5, alpha=0.8, mec="white", mew=0.6, zorder=3
        )
        shift = 0.0 if gains.compute == "total" else one.choosing
        for low, high, line in (
            (one.flops[trained].min(), one.flops.max(), "-"),
            (one.flops.max(), max(one.flops.max(), one.total), "--"),
        ):
            if high > low:
                c = np.geomspace(low, high, _POINTS)
                name = one.method if line == "-" else None
                axis.plot(
                    c + shift, gain(c, one.law, one.total), line, color=style.color, label=name
                )
    x, y = np.concatenate(xs), np.concatenate(ys)
    front = pareto_front(x, y, gains.sign)
    axis.plot(x[front], y[front], color=SOFT, lw=1.0, drawstyle="steps-post", zorder=1)
    axis.plot(
        x[front], y[front], "o", ms=9, mfc="none", mec=INK, mew=1.0, label="Pareto front", zorder=4
    )
    axis.margins(y=0.08)


def fixed_budget_figure(gains: Gains, task: str) -> Picture:
    """Draw the selectors at equal budgets: training's alone, and with the choosing charged."""
    laws = gains.of(task)
    size = sizes_of(laws)[-1]
    mine = [one for one in laws if one.size == size]
    look = looks(methods_of(laws))
    with panels(2, width=5.0, height=3.8) as (figure, axes):
        for axis, charged in zip(axes[0], (False, True), strict=True):
            _bars(axis, mine, gains, look, charged=charged)
            what = "budget" if charged else "training compute"
            axis.set_xlabel(f"{what}, as a part of training on everything")
            axis.set_title("choosing charged" if charged else "choosing for free")
        bounds = np.array([axis.get_ylim() for axis in axes[0]])
        for axis in axes[0]:
            axis.set_ylim(bounds[:, 0].min(), bounds[:, 1].max())
        axes[0][0].set_ylabel(gains.unit)
        handles = max(axes[0], key=lambda axis: len(axis.get_legend_handles_labels()[0]))
        legend_below(figure, handles, columns=6)
        picture = png(figure)
    return Picture(
        name=f"fixed-budget-{file_name(task)}",
        title=f"Selectors at equal budgets: {task}, {size_name(size)} parameters",
        text=f"What the laws predict, with {gains.confidence:.0%} intervals. Left, all train "
        "for as long; right, all pay for choosing from the same budget, and who cannot is "
        "marked ×.",
        png=picture,
        columns=2,
    )


def _bars(
    axis: Any, mine: Sequence[Gain], gains: Gains, look: dict[str, Look], *, charged: bool
) -> None:
    tail = (1.0 - gains.confidence) / 2.0
    wide = 0.8 / len(mine)
    too_dear = []
    for place, one in enumerate(mine):
        style = look[one.method]
        named = False
        for group, share in enumerate(SHARES):
            x = group - 0.4 + (place + 0.5) * wide
            budget = share * one.total
            trained = budget - one.choosing if charged else budget
            counted = trained + (one.choosing if gains.compute == "total" else 0.0)
            if trained <= 0:
                too_dear.append((x, style.color))
                continue
            value = float(gain(counted, one.law, one.total))
            low, high = np.quantile(gain(counted, one.draws, one.total), (tail, 1.0 - tail))
            axis.errorbar(
                x,
                value,
                yerr=[[max(value - low, 0.0)], [max(high - value, 0.0)]],
                fmt=style.marker,
                color=style.color,
                ms=6,
                capsize=2.5,
                lw=1.3,
                label=None if named else one.method,
            )
            named = True
    for edge in range(1, len(SHARES)):
        axis.axvline(edge - 0.5, color=GRID, lw=1.0)
    axis.set_xlim(-0.5, len(SHARES) - 0.5)
    axis.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
    axis.grid(visible=False, axis="x")
    for x, color in too_dear:
        axis.plot(x, 0.03, "x", color=color, ms=6, mew=1.6, transform=axis.get_xaxis_transform())


def file_name(text: str) -> str:
    """Return a text as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)
