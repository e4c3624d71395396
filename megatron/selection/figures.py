"""The look of the figures of a fit and a plan: one style, colours that colour-blind readers see.

matplotlib's canvas is used directly, without a window and without pyplot's global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.selection.libraries import load

# Okabe and Ito's palette, darkest first; the order is that of first appearance.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-")
INK: Final = "#16181d"
SOFT: Final = "#5c626e"
GRID: Final = "#e3e3df"
DPI: Final = 160

_STYLE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "text.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "figure.facecolor": "white",
    }
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished figure.

    Attributes:
        name: of its file, without ending.
        title: over it in a page.
        text: what it shows, in a sentence or two.
        png: the picture.
        columns: panels beside each other, by which a page gives it room.
    """

    name: str
    title: str
    text: str
    png: bytes
    columns: int = 1

    def write(self, folder: Path) -> Path:
        """Write the picture and return its path.

        Raises:
            RunError: the disk refuses.
        """
        path = folder / f"{self.name}.png"
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.png)
        return path


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn, the same in all figures of a fit."""

    color: str
    marker: str
    line: Any


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Return how each method is drawn; more than seven share colours, with other lines."""
    return {
        name: Look(
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            line=LINES[(index + index // len(COLOURS)) % len(LINES)],
        )
        for index, name in enumerate(methods)
    }


@contextmanager
def panels(
    columns: int, rows: int = 1, *, width: float = 4.4, height: float = 3.5
) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes [rows, columns], in the house style.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = load("matplotlib", "drawing figures")
    figures = load("matplotlib.figure", "drawing figures")
    load("matplotlib.backends.backend_agg", "drawing figures")
    with matplotlib.rc_context(dict(_STYLE)):
        figure = figures.Figure(
            figsize=(width * columns, height * rows), layout="constrained", dpi=DPI
        )
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, axes


def png(figure: Any) -> bytes:
    """Return a figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Any, axis: Any, *, columns: int = 4) -> None:
    """Put one legend for all panels under them."""
    handles, names = axis.get_legend_handles_labels()
    seen = dict(zip(names, handles, strict=True))
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=min(columns, len(seen))
    )
