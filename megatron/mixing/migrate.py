"""Following an edit of the domains: what a method remembers, for other domains than before.

A state is JSON: vectors keyed by domain name, nested in mappings and lists.  :func:`follow`
walks through it.  An entry of a domain that stays is kept; a part of a split domain takes over
the whole's; a removed domain's is put aside and taken up again when it returns; and what a
newcomer starts from is said, for every entry of a state, by a :data:`Follow`: :func:`mean`
(what the others have on average), :func:`newcomer` (a given value), :func:`share` and
:func:`log_share` (distributions), or :func:`reset` (the entry starts anew for all).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from megatron.errors import CheckpointError
from megatron.state import check_state

Numbers: TypeAlias = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Which domains there were, and which there are.

    Attributes:
        before: names of the domains when the state was taken.
        after: names of the domains now.
        measured_before: ``before``, and the domains that were only measured.
        measured_after: ``after``, and the domains that are only measured.
        parents: for a part of a split domain, the whole's name.
        given_before: the given weights when the state was taken, sum 1; None = not known.
        given: the given weights, sum 1.
        retired: what was put aside of domains that are gone, by name and place in the state.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    measured_before: tuple[str, ...]
    measured_after: tuple[str, ...]
    parents: Mapping[str, str]
    given_before: Mapping[str, float] | None
    given: Mapping[str, float]
    retired: Mapping[str, Numbers]

    @property
    def needed(self) -> bool:
        """Whether anything differs but the order."""
        return set(self.before) != set(self.after) or (
            set(self.measured_before) != set(self.measured_after)
        )

    def source(self, name: str, among: Sequence[str]) -> str | None:
        """Return whose entry a domain has: its own or its parent's; None for a newcomer."""
        parent = self.parents.get(name)
        return next((one for one in (name, parent) if one is not None and one in among), None)

    def heirs(self) -> dict[str, list[str]]:
        """Return, for each domain of before that goes on as itself or in parts, which."""
        found: dict[str, list[str]] = {}
        for name in self.after:
            if (source := self.source(name, self.before)) is not None:
                found.setdefault(source, []).append(name)
        return found

    def log_shares(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Return the logarithms of weights that follow the edit; see :meth:`shares`.

        Args:
            logs: of the weights so far, by name; minus infinity for weight 0.
        """
        heirs = self.heirs()
        inherited = [name for names in heirs.values() for name in names]
        new = math.fsum(self.given[name] for name in self.after if name not in inherited)
        total = _log_sum([logs[source] for source in heirs])
        if total == -math.inf:
            return {name: _log(self.given[name]) for name in self.after}
        result = {name: _log(self.given[name]) for name in self.after if name not in inherited}
        for source, names in heirs.items():
            all_given = math.fsum(self.given[name] for name in names)
            for name in names:
                part = self.given[name] / all_given if all_given > 0 else 1.0 / len(names)
                result[name] = logs[source] + _log(part) + _log(max(1.0 - new, 0.0)) - total
        return {name: result[name] for name in self.after}

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return a distribution that follows the edit.

        A newcomer gets what the given weights assign it.  Those that stay share the rest as
        they did, the parts of a split domain dividing its weight by their given weights.

        Args:
            weights: of any positive sum, by name.

        Returns:
            Weights of sum 1, by name, in the order of ``after``.
        """
        logs = self.log_shares({name: _log(weight) for name, weight in weights.items()})
        result = {name: math.exp(value) for name, value in logs.items()}
        total = math.fsum(result.values())
        return {name: value / total for name, value in result.items()}


Follow: TypeAlias = Callable[[Edit, Any, str], Any]
"""From an edit, an entry of a state and its place to the entry after the edit."""


def follow(state: Mapping[str, Any], how: Mapping[str, Follow], edit: Edit) -> dict[str, Any]:
    """Return every entry of a state as ``how`` says of it, by name; :func:`mean` if it does not."""
    return {key: how.get(key, mean)(edit, value, key) for key, value in state.items()}


def follow_window(window: Mapping[str, Any] | None, edit: Edit) -> dict[str, Any] | None:
    """Return the evidence since the last update after an edit: there is none of a newcomer."""
    if window is None:
        return None
    none_yet = {key: newcomer(None if key == "valid_loss" else 0.0) for key in window}
    return {key: none_yet[key](edit, value, f"window/{key}") for key, value in window.items()}


def mean(edit: Edit, value: Any, place: str) -> Any:
    """Start a newcomer from the mean of those that were there."""
    return _walk(edit, value, place, _mean)


def newcomer(start: float | None) -> Follow:
    """Start a newcomer from ``start``."""
    return lambda edit, value, place: _walk(edit, value, place, lambda present: start)


def reset(anew: Any) -> Follow:
    """Let the entry be ``anew``, whatever it was."""
    return lambda edit, value, place: anew


def share(edit: Edit, value: Any, place: str) -> Any:
    """Follow with a vector of shares, of any sum, which stays; see :meth:`Edit.shares`."""
    if value is None:
        return None
    total = math.fsum(value.values())
    if total <= 0:
        return dict.fromkeys(edit.after, 0.0)
    return {name: part * total for name, part in edit.shares(value).items()}


def log_share(edit: Edit, value: Any, place: str) -> Any:
    """Follow with the logarithms of shares; a domain that is given no weight has 0 in them."""
    if value is None:
        return None
    given = edit.given_before or dict.fromkeys(edit.before, 1.0)
    logs = {name: log if given[name] > 0 else -math.inf for name, log in value.items()}
    shares = edit.log_shares(logs)
    return {name: log if log > -math.inf else 0.0 for name, log in shares.items()}


def share_of_all(edit: Edit, value: Any, place: str) -> Any:
    """Follow with a matrix of sum 1, or None if nothing is left; a newcomer has the mean in it."""
    rows: dict[str, dict[str, float]] | None = mean(edit, value, place)
    total = math.fsum(part for row in (rows or {}).values() for part in row.values())
    if rows is None or total <= 0:
        return None
    return {
        name: {other: part / total for other, part in row.items()} for name, row in rows.items()
    }


def left_behind(state: Mapping[str, Any], edit: Edit) -> dict[str, dict[str, float | None]]:
    """Return what to put aside: the numbers of every domain that is not trained on any more."""
    gone = [name for name in edit.measured_before if name not in edit.after]
    kept: dict[str, dict[str, float | None]] = {name: {} for name in gone}
    for key, value in state.items():
        _collect(edit, value, key, kept)
    return kept


VERSION: Final = 2
KEYS: Final = (
    "method",
    "domains",
    "targets",
    "step",
    "measured_step",
    "given",
    "weights",
    "moved",
    "window",
    "rule",
    "retired",
)


def unguarded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is inside a guardrail's state, for a run that goes on without one."""
    return state["controller"] if "guardrail" in state else state


def current_state(state: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return a mixer's state in the present version's form, its keys checked.

    Version 1 knew of no domains that are only measured and of no edits, and not what the
    given weights were.

    Raises:
        CheckpointError: another version, or other keys.
    """
    state = unguarded(state)
    if "groups" in state:
        raise CheckpointError(
            f"the checkpoint's {owner} acted on the groups {sorted(state['groups'])} and the "
            f"configuration's acts on domains; give it the same groups, or start a new run"
        )
    if state.get("version") == 1:
        more: dict[str, Any] = {"targets": [], "given": None, "moved": True, "retired": {}}
        state = {**state, **more, "version": VERSION}
    check_state(owner, state, version=VERSION, keys=KEYS)
    return dict(state)


def migrated(
    state: Mapping[str, Any], how: Mapping[str, Follow], edit: Edit, start: Numbers | None
) -> dict[str, Any]:
    """Return a mixer's state after an edit.

    Args:
        state: as :func:`current_state` gives it.
        how: what the method says of the entries of its rule.
        edit: the edit.
        start: the weights of a new run, for a method that has not moved any yet; None for
            one that has.
    """
    aside = {**state["retired"], **left_behind(state["rule"], edit)}
    return {
        **state,
        "domains": list(edit.after),
        "targets": [name for name in edit.measured_after if name not in edit.after],
        "given": dict(edit.given),
        "weights": share(edit, state["weights"], "weights") if start is None else start,
        "window": follow_window(state["window"], edit),
        "rule": follow(state["rule"], how, edit),
        "retired": {name: kept for name, kept in aside.items() if name not in edit.after},
    }


def _collect(edit: Edit, value: Any, place: str, kept: dict[str, dict[str, float | None]]) -> None:
    if _of_domains(edit, value) is not None:
        for name, numbers in kept.items():
            if _is_number(value.get(name)):
                numbers[place] = value[name]
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            _collect(edit, entry, f"{place}/{key}", kept)


def _walk(edit: Edit, value: Any, place: str, start: Callable[[list[float]], float | None]) -> Any:
    names = _of_domains(edit, value)
    if names is not None:
        return _vector(edit, value, names, place, start)
    if isinstance(value, Mapping):
        return {key: _walk(edit, entry, f"{place}/{key}", start) for key, entry in value.items()}
    if isinstance(value, list):
        return [_walk(edit, entry, place, start) for entry in value]
    return value


def _of_domains(edit: Edit, value: Any) -> tuple[str, ...] | None:
    """Return the names that a mapping has after the edit; None if it is not one by domain."""
    if not isinstance(value, Mapping):
        return None
    if value.keys() == set(edit.before):
        return edit.after
    return edit.measured_after if value.keys() == set(edit.measured_before) else None


def _vector(
    edit: Edit,
    value: Mapping[str, Any],
    names: tuple[str, ...],
    place: str,
    start: Callable[[list[float]], float | None],
) -> dict[str, Any]:
    """Return a vector, a matrix (rows by name), or columns (lists by name) after the edit."""
    sources = {name: edit.source(name, tuple(value)) for name in names}
    some = next(iter(value.values()))
    if isinstance(some, Mapping):
        rows = {name: _walk(edit, row, place, start) for name, row in value.items()}
        columns: dict[str, list[Mapping[str, Any]]] = {name: list(rows.values()) for name in names}
        return {
            name: _typical(columns[name], start) if source is None else rows[source]
            for name, source in sources.items()
        }
    if isinstance(some, list):
        unknown = [None] * len(some)
        return {
            name: list(unknown if source is None else value[source])
            for name, source in sources.items()
        }
    kept = [source for source in sources.values() if source is not None]
    present = [float(value[name]) for name in kept or value if value[name] is not None]
    return {
        name: _newcomer(edit, name, place, start(present)) if source is None else value[source]
        for name, source in sources.items()
    }


def _newcomer(edit: Edit, name: str, place: str, start: float | None) -> float | None:
    """Return what was put aside of a domain, or of the one that it is a part of, else ``start``."""
    for one in (name, edit.parents.get(name, name)):
        if place in edit.retired.get(one, {}):
            return edit.retired[one][place]
    return start


def _typical(
    rows: list[Mapping[str, Any]], start: Callable[[list[float]], float | None]
) -> dict[str, float | None]:
    """Return the row of a newcomer: in every column what it would start from there."""
    return {key: start([row[key] for row in rows if row[key] is not None]) for key in rows[0]}


def _mean(present: list[float]) -> float | None:
    return math.fsum(value / len(present) for value in present) if present else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _log_sum(logs: list[float]) -> float:
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logs))
