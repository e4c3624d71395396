"""A Savitzky-Golay filter over a history that grows, with a memory that hardly does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.state import check_state

Matrix = npt.NDArray[np.float64]


class SmoothedHistory:
    """Every ``every``-th value of a smoothed history of vectors, [N, K].

    It gives what filtering the whole history at once would: each value is that of the
    polynomial fitted to the window around it, and those near the ends that of the
    polynomial fitted to the first or the last window.  It keeps one window of raw values
    and the smoothed ones that later values cannot change any more.  A history shorter
    than the window is smoothed with the largest odd window that fits.

    Args:
        window: values of a window, odd.
        order: of the polynomial, below ``window``.
        every: distance of the values that are kept, from the first on.
    """

    def __init__(self, *, window: int, order: int, every: int) -> None:
        self._window, self._order, self._every = window, order, every
        self._filter = _filter(window, order)
        self._raw: list[npt.NDArray[np.float64]] = []
        self._done: list[npt.NDArray[np.float64]] = []
        self._count = 0

    def __len__(self) -> int:
        """Return how many values came in."""
        return self._count

    def append(self, values: npt.NDArray[np.float64]) -> None:
        """Add the next vector, [K]; NaN = not known yet."""
        for place in np.flatnonzero(np.isfinite(values) & self._unknown(len(values))):
            for earlier in self._raw:  # a domain counts from the start as it was first seen
                earlier[place] = values[place]
        self._raw = [*self._raw, values.copy()][-self._window :]
        self._count += 1
        if self._count < self._window:
            return
        half = self._window // 2
        first = self._count == self._window
        for row in range(half + 1) if first else (half,):
            if (self._count - self._window + row) % self._every == 0:
                self._done.append(self._filter[row] @ np.array(self._raw))

    def _unknown(self, count: int) -> npt.NDArray[np.bool_]:
        return np.isnan(self._raw[-1]) if self._raw else np.zeros(count, dtype=np.bool_)

    def values(self) -> Matrix:
        """Return the kept values so far, [N, K]."""
        raw = np.array(self._raw)
        if self._count >= self._window:
            rows = range(self._window // 2 + 1, self._window)
            filtered = self._filter @ raw
        else:
            fitting = self._count - (1 - self._count % 2)
            rows = range(self._count)
            filtered = raw
            if fitting > self._order:
                edge, half = _filter(fitting, self._order), fitting // 2
                first, last = edge @ raw[:fitting], edge @ raw[-fitting:]
                filtered = np.vstack((first[: half + 1], last[half + fitting - self._count + 1 :]))
        offset = self._count - len(raw)
        kept = [filtered[row] for row in rows if (offset + row) % self._every == 0]
        return np.array([*self._done, *kept])

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the history, JSON-able, in columns by name."""
        return {
            "version": 1,
            "count": self._count,
            "raw": _columns(self._raw, names),
            "done": _columns(self._done, names),
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            CheckpointError: keys are missing or unknown.
            ValueError, KeyError, TypeError: it is damaged.
        """
        check_state("a loss history", state, version=1, keys=("count", "raw", "done"))
        count = state["count"]
        raw, done = _rows(state["raw"], names), _rows(state["done"], names)
        if not isinstance(count, int) or len(raw) != min(count, self._window):
            raise ValueError(f"count is {count!r} with {len(raw)} values")
        self._count, self._raw, self._done = count, raw, done


def _filter(window: int, order: int) -> Matrix:
    """Return the matrix that takes a window's values to its polynomial's, [window, window]."""
    places = np.linspace(-1.0, 1.0, window)
    basis, _ = np.linalg.qr(np.vander(places, order + 1))
    return np.asarray(basis @ basis.T)


def _columns(
    rows: Sequence[npt.NDArray[np.float64]], names: Sequence[str]
) -> dict[str, list[float | None]]:
    return {
        name: [None if np.isnan(row[place]) else float(row[place]) for row in rows]
        for place, name in enumerate(names)
    }


def _rows(
    columns: Mapping[str, Sequence[float | None]], names: Sequence[str]
) -> list[npt.NDArray[np.float64]]:
    if columns.keys() != set(names):
        raise KeyError(f"columns {sorted(columns)}")
    matrix = np.array(
        [[np.nan if value is None else value for value in columns[name]] for name in names],
        dtype=np.float64,
    )
    return list(matrix.T.copy())
