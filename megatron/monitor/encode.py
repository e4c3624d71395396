"""Fast JSON for vectors keyed by domain name.

A ledger of a thousand domains writes some five thousand numbers a step, most of
which did not change since the step before (counts of zero, epochs of a domain
that was not drawn, a static mixture).  Only entries whose bits changed are
formatted again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt


def number(value: float | int | None) -> float | int | None:
    """Return ``value`` as JSON can carry it: ``None`` for NaN and infinities."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def named(values: Mapping[str, float]) -> dict[str, float | int | None]:
    """Return a mapping with non-finite numbers as ``None``."""
    return {name: number(float(value)) for name, value in values.items()}


def dumps(value: Any) -> str:
    """Return ``value`` as compact JSON on one line; floats read back to the same bits."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class VectorEncoder:
    """Writes a ``[K]`` vector as a JSON object, remembering the text of unchanged entries."""

    def __init__(self, names: Sequence[str]) -> None:
        """Take the K keys, in order."""
        self._keys = [json.dumps(name) + ":" for name in names]
        self._pieces: list[str] = []
        self._bits: npt.NDArray[np.int64] | None = None
        self._is_float = False

    def encode(self, values: npt.NDArray[Any]) -> str:
        """Return the object for float64 or int64 ``values`` ``[K]``; non-finite becomes null."""
        values = np.ascontiguousarray(values)
        is_float = values.dtype.kind == "f"
        bits = values.view(np.int64)
        if self._bits is None or is_float != self._is_float:
            self._pieces = list(map(add, self._keys, texts(values)))
        else:
            changed = np.flatnonzero(bits != self._bits)
            keys, pieces = self._keys, self._pieces
            for index, text in zip(changed.tolist(), texts(values[changed]), strict=True):
                pieces[index] = keys[index] + text
        self._bits, self._is_float = bits.copy(), is_float
        return "{" + ",".join(self._pieces) + "}"


def texts(values: npt.NDArray[Any]) -> list[str]:
    """Return each number as JSON.

    Python's ``repr`` is the shortest decimal that reads back to the same float64.
    """
    result = list(map(repr, values.tolist()))
    if values.dtype.kind == "f":
        for index in np.flatnonzero(~np.isfinite(values)).tolist():
            result[index] = "null"
    return result
