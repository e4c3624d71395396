"""What benchmarks share: the search for the largest size, results among others, peers' weights."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from support.source import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.support.largest import largest
from benchmarks.support.measure import write_among


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 13, 64, 100, 1000])
@pytest.mark.parametrize("first", [1, 4, 16])
def test_the_largest_size_is_found_and_no_size_asked_twice(limit: int, first: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest(fits, first=first, most=100)
    assert found == min(limit, 100)
    assert len(set(asked)) == len(asked) <= 2 + 2 * 7
    assert all(1 <= size <= 100 for size in asked)


def test_a_result_takes_the_place_of_an_earlier_one_like_it(tmp_path: Any) -> None:
    def result(name: str, value: int) -> dict[str, Any]:
        return {"name": name, "value": value, "machine": {"date": str(value)}}

    for name, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        path = write_among("some", "run", result(name, value), lambda one: one["name"], tmp_path)
    content = json.loads(path.read_text())
    assert [(one["name"], one["value"]) for one in content["results"]] == [
        ("a", 3),
        ("b", 2),
        ("c", 4),
    ]
    assert content["machine"] == {"date": "4"}
