"""How a state follows an edit of the domains, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from megatron.mixing.migrate import Edit, log_share, mean, newcomer, share, share_of_all


def make_edit(
    before: Sequence[str],
    after: Sequence[str],
    *,
    given: Mapping[str, float] | None = None,
    given_before: Mapping[str, float] | None = None,
    parents: Mapping[str, str] | None = None,
    measured: tuple[str, str] | None = None,
) -> Edit:
    weights = given or dict.fromkeys(after, 1.0)
    total = sum(weights.values())
    return Edit(
        before=tuple(before),
        after=tuple(after),
        measured_before=tuple(measured[0] if measured else before),
        measured_after=tuple(measured[1] if measured else after),
        parents=parents or {},
        given_before=given_before,
        given={name: weight / total for name, weight in weights.items()},
        retired={"r": {"v": 7.0}},
    )


def test_shares_follow_by_the_stated_rule() -> None:
    edit = make_edit(
        "abc",
        ["b", "n", "a1", "a2"],
        given={"b": 2, "n": 1, "a1": 1, "a2": 0},
        parents={"a1": "a", "a2": "a"},
    )
    found = edit.shares({"a": 0.6, "b": 0.2, "c": 0.2})
    assert found == pytest.approx({"b": 0.75 / 4, "n": 0.25, "a1": 0.75 * 3 / 4, "a2": 0.0})
    assert share(edit, {"a": 6.0, "b": 2.0, "c": 2.0}, "v") == pytest.approx(
        {name: 10 * part for name, part in found.items()}
    )
    logs = log_share(edit, {"a": math.log(0.6), "b": math.log(0.2), "c": math.log(0.2)}, "v")
    assert math.exp(logs["a1"]) == pytest.approx(found["a1"])
    assert logs["a2"] == 0.0


def test_logarithms_keep_weights_too_small_for_a_float() -> None:
    edit = make_edit("abc", "abd")
    logs = log_share(edit, {"a": -1e4, "b": 0.0, "c": -5.0}, "v")
    assert logs["a"] - logs["b"] == pytest.approx(-1e4)
    assert math.exp(logs["d"]) == pytest.approx(1 / 3)


def test_where_nothing_is_inherited_the_given_weights_hold() -> None:
    assert make_edit("ab", "cd", given={"c": 1, "d": 3}).shares({"a": 0.5, "b": 0.5}) == (
        pytest.approx({"c": 0.25, "d": 0.75})
    )
    lost = make_edit("ab", "bc", given={"b": 1, "c": 3}).shares({"a": 1.0, "b": 0.0})
    assert lost == pytest.approx({"b": 0.25, "c": 0.75})


def test_vectors_matrices_and_histories_are_followed() -> None:
    edit = make_edit("ab", ["b", "r", "n"])
    tree = {
        "k": 3,
        "rows": [{"a": 1.0, "b": 2.0}],
        "matrix": {"a": {"a": 1.0, "b": 2.0}, "b": {"a": 3.0, "b": 4.0}},
        "columns": {"a": [1.0, 2.0], "b": [3.0, None]},
    }
    found = mean(edit, tree, "t")
    assert found["k"] == 3
    assert found["rows"] == [{"b": 2.0, "r": 2.0, "n": 2.0}]
    assert found["matrix"]["b"] == {"b": 4.0, "r": 4.0, "n": 4.0}
    assert found["matrix"]["n"] == {"b": 3.0, "r": 3.0, "n": 3.0}
    assert found["columns"] == {"b": [3.0, None], "r": [None, None], "n": [None, None]}
    assert newcomer(0.5)(edit, {"a": 1.0, "b": None}, "v") == {"b": None, "r": 7.0, "n": 0.5}
    matrix = share_of_all(edit, {"a": {"a": 0.4, "b": 0.2}, "b": {"a": 0.1, "b": 0.3}}, "m")
    assert sum(part for row in matrix.values() for part in row.values()) == pytest.approx(1)


def test_a_target_may_come_and_go() -> None:
    """What is only measured has entries beside the domains; nothing of theirs is lost."""
    edit = make_edit("ab", "ab", measured=("abx", "aby"))
    assert mean(edit, {"a": 1.0, "b": 3.0, "x": 8.0}, "v") == {"a": 1.0, "b": 3.0, "y": 2.0}
    assert mean(edit, {"a": 1.0, "b": 3.0}, "v") == {"a": 1.0, "b": 3.0}
