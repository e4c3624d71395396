"""How alike the choices of selectors are, from their score tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from megatron.errors import ConfigError, DataError
from megatron.selection.base import FloatArray
from megatron.selection.figures import Picture, panels, png
from megatron.selection.libraries import load
from megatron.selection.table import ScoreTable

ORDERS: Final = ("top", "low")


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """How alike choices are, by pairs of tables.

    Attributes:
        names: of the tables, N.
        share: of the documents that each chooses.
        jaccard: documents that both choose, by those that either does, [N, N].
        rank: Spearman's rank correlation of the scores, [N, N].
        documents: that all tables could score.
    """

    names: tuple[str, ...]
    share: float
    jaccard: FloatArray
    rank: FloatArray
    documents: int

    @property
    def expected(self) -> float:
        """Jaccard index to expect of two choices by lot."""
        return self.share / (2.0 - self.share)


def read_score_names(texts: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """Read ``FILE``, ``NAME=FILE`` and ``NAME:low=FILE``: by name, the file and what is chosen.

    Raises:
        ConfigError: a name is given twice, or an order is none.
    """
    found: dict[str, tuple[Path, str]] = {}
    for text in texts:
        label, is_pair, file = text.rpartition("=")
        name, _, order = label.partition(":") if is_pair else (Path(file).stem, "", "")
        if (order or "top") not in ORDERS:
            raise ConfigError(f"--scores {text}: '{order}' is neither of {', '.join(ORDERS)}")
        if name in found or not name:
            raise ConfigError(f"--scores {text}: give every table a name of its own: NAME=FILE")
        found[name] = (Path(file), order or "top")
    return found


def similarity(tables: Mapping[str, tuple[Path, str]], share: float) -> Similarity:
    """Compare what the top (or the low) share of each table is.

    Args:
        tables: by name, the file and ``top`` or ``low``; of the same corpus.
        share: of the documents, chosen by each.

    Raises:
        ConfigError: fewer than two tables, or a share outside (0, 1).
        DataError: a file is no table of scores, or tables are of different corpora.
        MissingExtraError: scipy or pyarrow is not installed.
    """
    if len(tables) < 2:
        raise ConfigError("similarity is of two or more tables; give another --scores")
    if not 0 < share < 1:
        raise ConfigError(f"--similarity-share is {share:g}; it must be in (0, 1)")
    stats = load("scipy.stats", "a rank correlation")
    scores = _scores(tables)
    known = np.isfinite(scores).all(axis=0)
    if known.sum() < 2:
        raise DataError("there are no two documents that all tables could score")
    scores = scores[:, known]
    count = max(1, round(share * scores.shape[1]))
    chosen = np.zeros(scores.shape, dtype=bool)
    for row, values in enumerate(scores):
        chosen[row, np.argsort(-values, kind="stable")[:count]] = True
    both = chosen.astype(np.float64) @ chosen.T
    ranks = np.stack([stats.rankdata(values) for values in scores])
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    size = np.maximum(np.sqrt((ranks**2).sum(axis=1)), 1e-300)
    return Similarity(
        names=tuple(tables),
        share=share,
        jaccard=both / (2 * count - both),
        rank=(ranks @ ranks.T) / np.outer(size, size),
        documents=int(known.sum()),
    )


def _scores(tables: Mapping[str, tuple[Path, str]]) -> FloatArray:
    """Return the scores [tables, documents], higher = sooner chosen."""
    rows, data, first = [], None, ""
    for name, (path, order) in tables.items():
        table = ScoreTable(path)
        try:
            if data is not None and table.facts.data != data:
                raise DataError(
                    f"'{name}' ({path}) scores another corpus than '{first}'; give tables of one"
                )
            data, first = table.facts.data, first or name
            values = table.columns("score")["score"]
        finally:
            table.close()
        rows.append(-values if order == "low" else values)
    return np.stack(rows).astype(np.float64)


def similarity_figure(found: Similarity) -> Picture:
    """Draw two heat maps: what is chosen in common, and how the scores' ranks agree."""
    size = max(3.4, 0.62 * len(found.names) + 2.2)
    with panels(2, width=size + 0.5, height=size) as (figure, axes):
        for axis, values, title, low, colours in (
            (
                axes[0][0],
                found.jaccard,
                f"Jaccard index of the best {found.share:.0%}",
                0.0,
                "cividis",
            ),
            (axes[0][1], found.rank, "rank correlation of the scores", -1.0, "PuOr"),
        ):
            axis.grid(visible=False)
            image = axis.imshow(values, vmin=low, vmax=1.0, cmap=colours)
            places = range(len(found.names))
            axis.set_xticks(places, found.names, rotation=40, ha="right", rotation_mode="anchor")
            axis.set_yticks(places, found.names)
            axis.set_title(title)
            axis.spines[:].set_visible(False)
            for (row, column), value in np.ndenumerate(values):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
                axis.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="black" if light else "white",
                )
            figure.colorbar(image, ax=axis, shrink=0.8, pad=0.03).outline.set_visible(False)
        picture = png(figure)
    return Picture(
        name="similarity",
        title="How alike the choices are",
        text=f"Of {found.documents:,} documents that all could score. Two choices by lot would "
        f"have a Jaccard index of {found.expected:.2f} and a rank correlation of 0.",
        png=picture,
        columns=2,
    )
