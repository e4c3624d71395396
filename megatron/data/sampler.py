"""From sampling weights to the samples of a step, as a pure function of recorded state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.random import Philox
from numpy.typing import ArrayLike, NDArray

from megatron.data.apportion import ExhaustedError, draw_multinomial, to_uniform
from megatron.data.permutation import hash_key
from megatron.data.plan import EndOfData, Plan
from megatron.data.quota import Quota, follow_edit, owed_by_name
from megatron.errors import CheckpointError, ConfigError
from megatron.state import check_state

Unit = Literal["sample", "micro_batch", "step"]
Draw = Literal["apportion", "multinomial"]
OnExhausted = Literal["repeat", "stop", "drop"]

Ints = NDArray[np.int64]

_VERSION = 2


class Windowed(Protocol):
    """What the sampler needs to know of a domain."""

    @property
    def fixed_windows(self) -> int | None:
        """Samples per epoch if all epochs have the same number, else ``None``."""
        ...

    def num_windows(self, epoch: int) -> int:
        """Samples in an epoch, at least 1."""
        ...


class Sampler:
    """Plans steps: which domain and which of its samples fill each slot of the global batch.

    Knows nothing of ranks.  All randomness is a counter-based generator (Philox) keyed by
    (seed, step); all memory is in :meth:`state_dict`: per domain the epoch and the position in
    it, what the apportionment owes, and a block in progress; and the same of domains that an
    edit has removed, for their return (:func:`edit_domains`).
    """

    def __init__(
        self,
        domain_names: Sequence[str],
        windows_per_epoch: Sequence[int | Callable[[int], int] | Windowed],
        *,
        seed: int,
        global_batch: int,
        unit: Unit = "sample",
        micro_batch: int = 1,
        draw: Draw = "apportion",
        on_exhausted: OnExhausted = "repeat",
    ) -> None:
        """Start at the first sample of every domain.

        Args:
            domain_names: K distinct names.
            windows_per_epoch: per domain the samples in an epoch: a number, a function of the
                epoch, or a :class:`~megatron.data.domain.Domain`.
            seed: of the run.
            global_batch: G, samples in a step.
            unit: what is drawn at once: a sample, a whole micro-batch, or a whole step.
            micro_batch: B, samples per micro-batch; used by ``unit="micro_batch"`` only.
            draw: ``"apportion"`` keeps every domain within 1 + ln K units of its share;
                ``"multinomial"`` draws each unit independently.
            on_exhausted: at the end of a domain's epoch, ``"repeat"`` goes on with the next
                epoch, ``"stop"`` ends the run, ``"drop"`` goes on without the domain.

        Raises:
            ConfigError: an option has an unknown value, or B does not divide G.
        """
        names = tuple(domain_names)
        if not names or len(set(names)) != len(names) or len(windows_per_epoch) != len(names):
            raise ValueError("the sampler needs distinct domains, each with its windows")
        _check_option("unit", unit, ("sample", "micro_batch", "step"))
        _check_option("draw", draw, ("apportion", "multinomial"))
        _check_option("on_exhausted", on_exhausted, ("repeat", "stop", "drop"))
        self.domain_names = names
        self.global_batch, self.seed = global_batch, seed
        self._unit_size = {"sample": 1, "micro_batch": micro_batch, "step": global_batch}[unit]
        if global_batch < 1 or self._unit_size < 1 or global_batch % self._unit_size:
            raise ConfigError(
                f"mixing.unit: micro_batch: a global batch of {global_batch} samples is not a "
                f"multiple of the micro-batch of {self._unit_size}"
            )
        self._draw, self._on_exhausted = draw, on_exhausted
        self._key = hash_key("sampler", seed)
        self._windows_of = [_window_function(source) for source in windows_per_epoch]
        self._fixed = [_fixed_windows(source) for source in windows_per_epoch]
        self._quota = Quota(len(names))
        self._epoch: Ints = np.zeros(len(names), dtype=np.int64)
        self._position: Ints = np.zeros(len(names), dtype=np.int64)
        self._seen: Ints = np.zeros(len(names), dtype=np.int64)
        self._retired: Mapping[str, Any] = {}
        self._windows: Ints = self._windows_now(self._epoch)
        if (self._windows < 1).any():
            raise ValueError(f"a domain without samples: {self._windows}")

    @property
    def samples_seen(self) -> Ints:
        """Samples drawn from each domain since the run began, [K]."""
        return self._seen.copy()

    @property
    def epochs(self) -> NDArray[np.float64]:
        """Passes over each domain, with the fraction of the present one, [K]."""
        return self._epoch + self._position / self._windows

    def plan(self, step: int, sampling_weights: ArrayLike, fresh_quota: int | None = None) -> Plan:
        """Choose the samples of a step and move past them.

        Args:
            step: number of the step; keys the random numbers.
            sampling_weights: [K] non-negative; normalised here.
            fresh_quota: with N, forget what domains are owed and make this and the next N − 1
                steps one block, over which every domain gets within one unit of its share
                (under either kind of draw); what is owed afterwards is nothing.

        Raises:
            EndOfData: a domain (``stop``) or all domains (``drop``) are exhausted; the sampler
                is as it was.
        """
        asked = self._checked(sampling_weights)
        if fresh_quota is not None and fresh_quota < 1:
            raise ValueError(f"fresh_quota is {fresh_quota}: a block has at least one step")
        before = self._quota.snapshot()
        try:
            return self._plan(step, asked, fresh_quota)
        except ExhaustedError:
            self._quota.restore(before)
            wanted = [self.domain_names[place] for place in np.flatnonzero(asked)]
            raise EndOfData(step, wanted) from None
        except EndOfData:
            self._quota.restore(before)
            raise

    def upcoming(self, sampling_weights: ArrayLike, samples: int) -> tuple[Ints, Ints, Ints]:
        """Return what the next ``samples`` samples would mostly be, and change nothing.

        Returns:
            (domain, epoch, sample), grouped by domain: per domain the next
            ⌈weight × samples⌉ + 1 samples, the end of its epoch at most.
        """
        counts = np.ceil(self._checked(sampling_weights) * samples).astype(np.int64) + 1
        ended = self._position >= self._windows
        epoch, position = self._epoch + ended, np.where(ended, 0, self._position)
        counts = np.minimum(counts, np.where(ended, self._windows - 1, self._windows - position))
        domain = np.repeat(np.arange(counts.size), counts)
        return domain, epoch[domain], _ranges(position, counts)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, JSON-able, independent of ranks."""
        columns = (self._epoch.tolist(), self._position.tolist(), self._seen.tolist())
        cursors = {
            name: {"epoch": epoch, "position": position, "samples": samples}
            for name, epoch, position, samples in zip(self.domain_names, *columns, strict=True)
        }
        return {
            "version": _VERSION,
            "seed": self.seed,
            "cursors": cursors,
            "quota": self._quota.state_dict(self.domain_names),
            "retired": {name: dict(cursor) for name, cursor in self._retired.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the order of the domains and the global batch may differ.

        Raises:
            CheckpointError: another version, seed or set of domains, or a domain that has
                become smaller than what was read of it.
        """
        state = _current(state)
        cursors, names = state["cursors"], self.domain_names
        if set(cursors) != set(names):
            raise CheckpointError(
                f"the checkpoint has the domains {sorted(cursors)}, the configuration has "
                f"{sorted(names)}; resume with the same domains, or set allow_domain_edits: true"
            )
        if state["seed"] != self.seed:
            raise CheckpointError(
                f"the checkpoint was made with seed {state['seed']}, the configuration has "
                f"{self.seed}: samples would repeat within an epoch; resume with the same seed"
            )
        epoch, position, seen = (
            np.array([cursors[name][key] for name in names], dtype=np.int64)
            for key in ("epoch", "position", "samples")
        )
        windows = self._windows_now(epoch)
        if (position > windows).any():
            place = int(np.argmax(position > windows))
            raise CheckpointError(
                f"domain '{names[place]}': {position[place]} samples of the epoch are read, it "
                f"has {windows[place]} now; the data has changed since the checkpoint"
            )
        self._quota.load_state_dict(state["quota"], names)
        self._epoch, self._position, self._seen, self._windows = epoch, position, seen, windows
        self._retired = {name: dict(cursor) for name, cursor in state["retired"].items()}

    def _plan(self, step: int, asked: NDArray[np.float64], fresh_quota: int | None) -> Plan:
        weights, capacity = asked, None
        if self._on_exhausted == "drop":
            capacity = (self._windows - self._position) // self._unit_size
            if not (capacity > 0).all():
                weights = np.where(capacity > 0, asked, 0.0)
                if not weights.any():
                    raise ExhaustedError
                weights = weights / weights.sum()
        units = self.global_batch // self._unit_size
        drawn = self._draw_units(step, weights, units, capacity, fresh_quota)
        domain = np.repeat(drawn, self._unit_size)
        counts = np.bincount(domain, minlength=weights.size)
        if self._on_exhausted == "stop":
            over = np.flatnonzero(self._position + counts > self._windows)
            if over.size:
                raise EndOfData(step, [self.domain_names[place] for place in over])
        by_domain = np.argsort(domain, kind="stable")
        epoch, sample = np.empty_like(domain), np.empty_like(domain)
        epoch[by_domain], sample[by_domain] = self._advance(counts)
        return Plan(
            step=step, domain=domain.astype(np.int32), epoch=epoch, sample=sample, weights=weights
        )

    def _draw_units(
        self,
        step: int,
        weights: NDArray[np.float64],
        units: int,
        capacity: Ints | None,
        fresh_quota: int | None,
    ) -> Ints:
        """Return the domain of every unit of the step, in order."""
        philox = Philox(key=np.array([self._key, step], dtype=np.uint64))
        order = philox.random_raw(units)
        ties = philox.random_raw(max(weights.size, units))
        if self._draw == "multinomial" and fresh_quota is None and not self._quota.in_block:
            return draw_multinomial(weights, to_uniform(order), capacity, ties[:units])
        counts = self._quota.draw(
            weights,
            units,
            capacity=capacity,
            ties=ties[: weights.size],
            fresh_quota=fresh_quota,
        )
        drawn = np.empty(units, dtype=np.int64)
        drawn[np.argsort(order, kind="stable")] = np.repeat(np.arange(weights.size), counts)
        return drawn

    def _advance(self, counts: Ints) -> tuple[Ints, Ints]:
        """Take the next samples of every domain; return (epoch, sample), grouped by domain."""
        epoch = np.repeat(self._epoch, counts)
        sample = _ranges(self._position, counts)
        position = self._position + counts
        ends = np.cumsum(counts)
        self._seen = self._seen + counts
        crossing = np.flatnonzero(position > self._windows)
        if crossing.size:
            self._epoch, self._windows = self._epoch.copy(), self._windows.copy()
        for domain in crossing.tolist():
            part = slice(int(ends[domain] - counts[domain]), int(ends[domain]))
            epoch[part], sample[part] = self._cross(domain, int(counts[domain]))
            self._epoch[domain], position[domain] = epoch[part][-1], sample[part][-1] + 1
            self._windows[domain] = self._windows_of[domain](int(self._epoch[domain]))
        self._position = position
        return epoch, sample

    def _cross(self, domain: int, count: int) -> tuple[Ints, Ints]:
        """Return (epoch, sample) of the next ``count`` samples of a domain, over epochs' ends."""
        epoch, position = int(self._epoch[domain]), int(self._position[domain])
        fixed = self._fixed[domain]
        if fixed is not None:  # many epochs of a tiny domain in one step: no loop over them
            flat = position + np.arange(count, dtype=np.int64)
            return epoch + flat // fixed, flat % fixed
        epochs, samples = [], []
        while count:
            take = min(count, self._windows_of[domain](epoch) - position)
            epochs.append(np.full(take, epoch, dtype=np.int64))
            samples.append(np.arange(position, position + take, dtype=np.int64))
            count, epoch, position = count - take, epoch + 1, 0
        return np.concatenate(epochs), np.concatenate(samples)

    def _windows_now(self, epochs: Ints) -> Ints:
        return np.array(
            [
                windows(epoch)
                for windows, epoch in zip(self._windows_of, epochs.tolist(), strict=True)
            ],
            dtype=np.int64,
        )

    def _checked(self, sampling_weights: ArrayLike) -> NDArray[np.float64]:
        weights = np.asarray(sampling_weights, dtype=np.float64)
        if weights.shape != (len(self.domain_names),):
            raise ValueError(f"{weights.shape} weights for {len(self.domain_names)} domains")
        total = float(weights.sum())
        if not (np.isfinite(total) and total > 0 and (weights >= 0).all()):
            raise ValueError(f"sampling weights must be finite and non-negative: {weights}")
        # A distribution keeps its bits: what is recorded as drawn from, and replayed, is
        # what was decided.
        return weights.copy() if abs(total - 1.0) <= 1e-12 else weights / total


def edit_domains(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a sampler's state for other domains than it was taken with.

    Domains that stay keep their place, removed ones leave theirs behind, returning ones take
    it up again, new ones start at their first sample.  A block in progress is closed, and what
    is owed is kept as far as the bounds of the apportionment allow.

    Args:
        state: what :meth:`Sampler.state_dict` gave.
        names: of the domains from now on.

    Raises:
        CheckpointError: the state is of another version.
    """
    state = _current(state)
    cursors, retired = state["cursors"], state["retired"]
    if set(cursors) == set(names):
        return state
    owed = owed_by_name(state["quota"])
    left = {name: {**cursors[name], "carry": owed[name]} for name in cursors}
    known = {**retired, **left}
    new = {"epoch": 0, "position": 0, "samples": 0, "carry": 0.0}
    now = {name: known.get(name, new) for name in names}
    return {
        **state,
        "cursors": {
            name: {key: cursor[key] for key in ("epoch", "position", "samples")}
            for name, cursor in now.items()
        },
        "quota": follow_edit(state["quota"], {name: now[name]["carry"] for name in names}),
        "retired": {name: dict(known[name]) for name in known if name not in now},
    }


def _current(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state in the present version's form; version 1 knew of no removed domains."""
    if state.get("version") == 1:
        state = {**state, "version": _VERSION, "retired": {}}
    keys = ("seed", "cursors", "quota", "retired")
    check_state("the sampler", state, version=_VERSION, keys=keys)
    return dict(state)


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """Return ``starts[k], starts[k]+1, …`` (``counts[k]`` of them) for each k, end to end."""
    ends = np.cumsum(counts)
    flat: Ints = np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])
    return flat


def _window_function(source: int | Callable[[int], int] | Windowed) -> Callable[[int], int]:
    if isinstance(source, (int, np.integer)):
        fixed = int(source)
        return lambda epoch: fixed
    return source if callable(source) else source.num_windows


def _fixed_windows(source: int | Callable[[int], int] | Windowed) -> int | None:
    if isinstance(source, (int, np.integer)):
        return int(source)
    return None if callable(source) else source.fixed_windows


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"mixing.{name}: '{value}' is not one of {', '.join(known)}")
