"""Figures of a plan: where selectors break even, and the best choice under any budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np

from megatron.selection.base import FloatArray
from megatron.selection.break_even import BreakEven, rivals_of
from megatron.selection.budget_plan import charged_compute
from megatron.selection.cost_model import Model, size_name, sized_model
from megatron.selection.figures import (
    SOFT,
    Look,
    Picture,
    legend_below,
    looks,
    panels,
    png,
)
from megatron.selection.figures_fit import file_name
from megatron.selection.gain_law import gain
from megatron.selection.gains import Gain, Gains, laws_of, methods_of
from megatron.selection.laws_at import fitted_along, law_at
from megatron.selection.prices import Prices

_POINTS: Final = 240


def break_even_figure(
    gains: Gains, task: str, prices: Prices, found: Sequence[BreakEven], against: str | None = None
) -> Picture | None:
    """Draw each costly selector's lead over the free ones by the size of the trained model.

    Returns:
        None where there is nothing that costs, or nothing to beat.
    """
    if not found:
        return None
    laws = gains.of(task)
    rivals = rivals_of(laws, against)
    look = looks(methods_of(laws))
    shares = tuple(dict.fromkeys(one.share for one in found))[:4]
    sizes = _sizes(gains, task, found)
    columns = min(2, len(shares))
    rows = -(-len(shares) // columns)
    with panels(columns, rows, width=4.8, height=3.3) as (figure, axes):
        for axis, share in zip(axes.flat, shares, strict=False):
            mine = [one for one in found if one.share == share]
            _leads(axis, gains, laws, prices, mine, rivals, sizes, look)
            axis.set_title(f"budget: {share:.0%} of the corpus")
        for axis in axes.flat[len(shares) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("trained model (parameters)")
        highest = max(axis.get_ylim()[1] for axis in axes.flat[: len(shares)])
        for axis in axes.flat:
            # A lead of minus everything would leave no room for the leads that matter.
            axis.set_ylim(-1.5 * highest, 1.1 * highest)
        for row in axes:
            row[0].set_ylabel(f"lead over {' or '.join(rivals)}\n({gains.unit})")
        legend_below(figure, axes[0][0], columns=4)
        picture = png(figure)
    return Picture(
        name=f"break-even-{file_name(task)}",
        title=f"Break-even sizes: {task}",
        text="The budget is a part of what training on the whole corpus takes, so it grows with "
        "the trained model, and choosing takes less and less of it. Above the zero line the "
        "selector pays; the mark says from which size on, with the interval of the laws.",
        png=picture,
        columns=columns,
    )


def _sizes(gains: Gains, task: str, found: Sequence[BreakEven]) -> Any:
    known = [one.size for one in gains.of(task)]
    known += [one.selector for one in found if one.selector]
    known += [one.size for one in found if 0 < one.size < 1e3 * max(known)]
    return np.geomspace(min(known) / 2, max(known) * 8, _POINTS)


def _leads(
    axis: Any,
    gains: Gains,
    laws: Sequence[Gain],
    prices: Prices,
    found: Sequence[BreakEven],
    rivals: Sequence[str],
    sizes: Any,
    look: Mapping[str, Look],
) -> None:
    axis.set_xscale("log")
    axis.axhline(0.0, color=SOFT, lw=1.2)
    for place, one in enumerate(found):
        style = look[one.method]
        lead = _lead(gains, laws, prices, one, rivals, sizes)
        # Where choosing alone eats the budget there is no model to compare.
        axis.plot(sizes, lead, color=style.color, ls=style.line, label=one.method)
        if np.isfinite(one.size) and one.size > 0:
            inside = [max(one.low, sizes[0]), min(one.high, sizes[-1])]
            axis.plot(inside, [0, 0], color=style.color, lw=5, alpha=0.3, solid_capstyle="butt")
            axis.plot(one.size, 0, style.marker, color=style.color, ms=7, mec="white", zorder=4)
            ratio = "" if one.ratio is None else f" = {one.ratio:.2g}×"
            axis.annotate(
                f"{size_name(one.size)}{ratio}",
                (one.size, 0),
                xytext=(-4, 9) if place % 2 == 0 else (4, -16),
                textcoords="offset points",
                ha="right" if place % 2 == 0 else "left",
                color=style.color,
                fontsize=8.5,
                fontweight="bold",
                # Readable where a line runs behind it.
                bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.8},
                zorder=5,
            )
    axis.set_xlim(sizes[0], sizes[-1])


def _lead(
    gains: Gains,
    laws: Sequence[Gain],
    prices: Prices,
    one: BreakEven,
    rivals: Sequence[str],
    sizes: FloatArray,
) -> FloatArray:
    """Return how far a selector is ahead at every size; NaN where it is too dear."""
    total = prices.total(sized_model(sizes[0]), laws) / sizes[0] * sizes
    values = []
    for name in (one.method, *rivals):
        compute = charged_compute(gains, one.share * total, prices.choosing(name, laws), total)
        values.append(gains.sign * gain(compute, fitted_along(laws_of(laws, name), sizes), total))
    lead = values[0] - np.max(values[1:], axis=0)
    return np.where(one.share * total > prices.choosing(one.method, laws), lead, np.nan)


def simulation_figure(gains: Gains, task: str, models: Sequence[Model], prices: Prices) -> Picture:
    """Draw performance by budget for every selector, and which is best where.

    Raises:
        ConfigError: a selector's price is not known.
    """
    laws = gains.of(task)
    methods = methods_of(laws)
    look = looks(methods)
    shown = models[:6]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with panels(columns, rows, width=4.6 if columns > 1 else 6.4, height=3.8) as (figure, axes):
        for axis, model in zip(axes.flat, shown, strict=False):
            _simulate(axis, gains, laws, model, prices, look)
            how = law_at(laws_of(laws, methods[0]), model.parameters).how
            axis.set_title(f"{model.name}: {how}")
            axis.set_xlabel("budget, choosing and training (FLOPs)")
        for row in axes:
            row[0].set_ylabel(gains.unit)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        legend_below(figure, axes.flat[0], columns=6)
        picture = png(figure)
    return Picture(
        name=f"simulation-{file_name(task)}",
        title=f"Performance under a constraint: {task}",
        text="Every curve begins where its choosing is paid for, and ends at training on the whole "
        "corpus. The strip at the foot has the colour of the best selector at that budget. Sizes "
        "that were not run carry the nearest laws.",
        png=picture,
        columns=columns,
    )


def _simulate(
    axis: Any,
    gains: Gains,
    laws: Sequence[Gain],
    model: Model,
    prices: Prices,
    look: Mapping[str, Look],
) -> None:
    total = prices.total(model, laws)
    costs = {name: prices.choosing(name, laws) for name in look}
    budgets = np.geomspace(0.01 * total, max(costs.values()) + 1.2 * total, _POINTS)
    curves = []
    for name, style in look.items():
        compute = charged_compute(gains, budgets, costs[name], total)
        value = gain(compute, law_at(laws_of(laws, name), model.parameters).law, total)
        value = np.where(budgets > costs[name], value, np.nan)
        curves.append(gains.sign * value)
        axis.plot(budgets, value, color=style.color, ls=style.line, label=name)
    axis.set_xscale("log")
    axis.set_xlim(budgets[0], budgets[-1])
    axis.margins(y=0.12)
    best = np.where(np.isnan(curves), -np.inf, curves).argmax(axis=0)
    colors = [style.color for style in look.values()]
    edges = [0, *(np.flatnonzero(np.diff(best)) + 1), len(best) - 1]
    for start, stop in pairwise(edges):
        axis.axvspan(
            budgets[start], budgets[stop], ymin=0.0, ymax=0.035, color=colors[best[start]], lw=0
        )
