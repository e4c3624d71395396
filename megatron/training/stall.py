"""Says which rank waits where when a run stands still, and ends it when it stays so.

A collective that one rank never joins tells nothing: the others wait in it, and after half an
hour each fails with a time-out of its own.  Here the loop notes where it is (a
:class:`Heartbeat`), and a thread beside it (a :class:`Watchdog`) notices when that stops
changing, publishes the place, and on rank 0 collects the places of all.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")

EXIT_STALLED = 1

# The places of a step in their order: who is at an earlier one is waited for.
STARTING = "starting"
RESTORING = "restoring a checkpoint"
PLANNING = "planning"
MEASURING = "measuring before the step"
READING = "reading the batch"
COMPUTING = "forward and backward"
REDUCING = "reducing the ledger"
RECORDING = "recording"
VALIDATING = "validating"
SAVING = "saving"
ENDING = "ending"
_ORDER = (
    STARTING,
    RESTORING,
    PLANNING,
    MEASURING,
    READING,
    COMPUTING,
    REDUCING,
    RECORDING,
    VALIDATING,
    SAVING,
    ENDING,
)
# These may take as long as they need: they are reported, but not ended, as long as every rank
# still answers.  Planning is among them
# because a controller may ask for a validation there, and measuring because it may ask for a
# gradient of every domain.
_PATIENT = frozenset({STARTING, RESTORING, PLANNING, MEASURING, VALIDATING, SAVING})


def collective_minutes(stall_timeout: float) -> int:
    """Return a time-out for collectives that leaves the last word to the watchdog."""
    return max(30, math.ceil(stall_timeout / 60) + 10)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank is.

    Attributes:
        what: one of the places above.
        step: optimizer step; ``None`` outside of the steps.
        seconds: how long it has been there.
        host: the machine.
        count: how often it has published; does not rise where the process is stopped.
    """

    what: str
    step: int | None
    seconds: float
    host: str = ""
    count: int = 0

    @property
    def progress(self) -> tuple[int, int]:
        """Sorts places by how far they are in the run."""
        order = _ORDER.index(self.what) if self.what in _ORDER else len(_ORDER)
        return (-1 if self.step is None else self.step), order

    def __str__(self) -> str:
        """Name the place as a message does."""
        return self.what if self.step is None else f"{self.what} of step {self.step}"


class Heartbeat:
    """What the loop tells: where it is.  Noting it costs the assignment of an attribute."""

    def __init__(self) -> None:
        """Begin before the first step."""
        self._now: tuple[str, int | None, float] = (STARTING, None, time.monotonic())

    def at(self, what: str, step: int | None = None) -> None:
        """Note that this rank has come to ``what`` (of optimizer step ``step``)."""
        self._now = (what, step, time.monotonic())

    def reading(self, batches: Iterator[Item], step: int) -> Iterator[Item]:
        """Yield what ``batches`` yields, noting when it is waited for and when worked on."""
        while True:
            self.at(READING, step)
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.at(COMPUTING, step)
            yield batch

    def place(self) -> Place:
        """Return where this rank is, and for how long."""
        what, step, since = self._now
        return Place(what=what, step=step, seconds=time.monotonic() - since)


class Board(Protocol):
    """Where ranks leave their places; see :class:`megatron.engine.board.NoticeBoard`."""

    def publish(self, text: str) -> bool:
        """Write this rank's line."""
        ...

    def read(self) -> list[str | None]:
        """Return every rank's line."""
        ...


class Watchdog:
    """A thread beside a rank's main thread that notices when that stands still.

    Every rank publishes its place now and then.  One that has stood still for ``report_after``
    seconds writes its main thread's stack to its error output; rank 0 adds where all ranks
    are.  After ``end_after`` seconds the process ends with code 1 and the same message; where a
    place may take its time (saving, say), once some rank has not answered for that long.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        board: Board | None,
        *,
        rank: int,
        host: str,
        report_after: float,
        end_after: float,
        leave: Callable[[int], None] = os._exit,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Set up; nothing runs before :meth:`start`.

        Args:
            heartbeat: what the loop tells.
            board: where ranks leave their places; ``None`` if there is one rank.
            rank: this process.
            host: this machine.
            report_after: seconds after which a standstill is reported; 0: never.
            end_after: seconds after which it ends the process; 0: never.
            leave: ends the process.
            say: takes the messages; the error output if not given.
        """
        self._heartbeat = heartbeat
        self._board = board
        self._rank = rank
        self._host = host
        self._report_after = report_after
        self._end_after = end_after
        self._leave = leave
        self._say = say or _say
        self._count = 0
        self._heard: dict[int, tuple[int, float]] = {}
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        limits = [limit for limit in (report_after, end_after) if limit]
        self._tick = min(30.0, min(limits, default=0.0) / 4)
        self._thread = threading.Thread(target=self._watch, name="stall watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begin to watch, if there is anything to watch for, and return self."""
        if self._tick:
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        reported: tuple[str, int | None] | None = None
        while not self._over.wait(self._tick):
            self._publish()
            place = self._heartbeat.place()
            if self._report_after and place.seconds >= self._report_after:
                if reported != (place.what, place.step):
                    reported = (place.what, place.step)
                    self._report(place)
            else:
                reported = None
            if self._end_after and self._too_long(place) and self._end():
                return

    def _too_long(self, place: Place) -> bool:
        # The first rank is given the time to speak for all.
        allowed = self._end_after + (2 * self._tick + 10 if self._rank else 0)
        if place.what not in _PATIENT:
            return place.seconds >= allowed
        if place.seconds < self._end_after / 2:
            self._heard.clear()
            return False
        return self._silence() >= allowed

    def _silence(self) -> float:
        """Listen, and return for how many seconds the most silent rank has not been heard of."""
        if self._board is None:
            return 0.0
        now = time.monotonic()
        for rank, place in enumerate(_parse(self._board.read())):
            count = -1 if place is None else place.count
            if rank not in self._heard or count > self._heard[rank][0]:
                self._heard[rank] = (count, now)
        return max(now - since for _, since in self._heard.values())

    def _publish(self) -> None:
        self._count += 1
        place = self._heartbeat.place()
        if self._board is not None:
            self._board.publish(
                json.dumps([place.what, place.step, place.seconds, self._host, self._count])
            )

    def _report(self, place: Place) -> None:
        self._say(
            f"stall: rank {self._rank} on {self._host} has been at '{place}' for "
            f"{place.seconds:.0f} s; its main thread:\n{self._stack()}"
        )
        if self._rank == 0:
            self._say(self._survey())

    def _end(self) -> bool:
        """End the process; return False if it went on while the others were asked."""
        survey = self._survey()
        if self._over.is_set() or self._heartbeat.place().seconds < self._end_after:
            return False
        self._say(
            f"{survey}\nerror: nothing has moved for stall_timeout = {self._end_after:g} s; the "
            "run ends here, and goes on from its newest checkpoint when started again"
        )
        self._leave(EXIT_STALLED)
        return True

    def _survey(self) -> str:
        """Say where all ranks are, having given each the time to publish once more."""
        if self._board is None:
            return describe([self._heartbeat.place()])
        before = _parse(self._board.read())
        # A process that is stopped, or gone, left its last line there.
        self._over.wait(1.5 * self._tick)
        self._publish()
        now = _parse(self._board.read())
        answers = [
            place if place and (old is None or place.count > old.count) else None
            for old, place in zip(before, now, strict=True)
        ]
        if not any(answers):
            return (
                f"stall: rank {self._rank} is at '{self._heartbeat.place()}', and rank 0, which "
                "collects the places of all ranks, does not answer: it is stopped, gone or cut off"
            )
        return describe(answers, hosts=[place.host if place else "" for place in now])

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        lines = traceback.format_stack(frame)[-8:] if frame else []
        return "".join(lines).rstrip()


def describe(places: Sequence[Place | None], hosts: Sequence[str] = ()) -> str:
    """Say which ranks wait where, the likely cause first.

    What a run waits for is a rank that does not answer at all, or else the ranks that are
    furthest behind.

    Args:
        places: of every rank; ``None``: it does not answer.
        hosts: where ranks run, as far as that is known.
    """
    groups: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        groups.setdefault("" if place is None else str(place), []).append(rank)
    silent = groups.pop("", [])
    present = [place for place in places if place is not None]
    ordered = sorted(groups.items(), key=lambda group: _progress(places, group[1]))
    last = max((place.progress for place in present), default=(0, 0))
    lines = []
    if silent:
        verb = "does" if len(silent) == 1 else "do"
        lines.append(f"{_ranks(silent, hosts)} {verb} not answer: stopped, gone or cut off")
    for name, ranks in ordered:
        seconds = min(_seconds(places[rank]) for rank in ranks)
        behind = not silent and _progress(places, ranks) < last
        verb = (
            ("is" if len(ranks) == 1 else "are") + " still at"
            if behind
            else ("waits in" if len(ranks) == 1 else "wait in")
        )
        lines.append(f"{_ranks(ranks, hosts, behind)} {verb} '{name}' for {seconds:.0f} s")
    if len(lines) > 1:
        lines[0] += " (likely the cause)"
    return "stall: " + "; ".join(lines)


def _ranks(ranks: Sequence[int], hosts: Sequence[str], named: bool = True) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts[:20])
    text += ", …" if len(texts) > 20 else ""
    host = hosts[ranks[0]] if named and len(ranks) == 1 and ranks[0] < len(hosts) else ""
    return f"{text} on {host}" if host else text


def _progress(places: Sequence[Place | None], ranks: Sequence[int]) -> tuple[int, int]:
    place = places[ranks[0]]
    return place.progress if place else (0, 0)


def _seconds(place: Place | None) -> float:
    return place.seconds if place else 0.0


def _parse(lines: Sequence[str | None]) -> list[Place | None]:
    places: list[Place | None] = []
    for line in lines:
        if line is None:
            places.append(None)
            continue
        what, step, seconds, host, count = json.loads(line)
        places.append(Place(what=what, step=step, seconds=seconds, host=host, count=count))
    return places


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
