"""What a row of the fault table is, and how its trials are counted."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from support.pool import RankPools

Column = Literal["ci", "release"]
_TOLD = 20


class SkippedRowError(Exception):
    """The row cannot be run on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial that came to an end.

    Attributes:
        failure: what went wrong; ``None`` if nothing did.
        count: how many trials it stands for (an enumeration that ran as one test).
        cut: the clock has ended the row before its time.
        made: all trials have been made already, and are only told of: the clock is not asked.
    """

    failure: str | None = None
    count: int = 1
    cut: bool = False
    made: bool = False


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a row works with.

    Attributes:
        folder: its own, empty.
        seed: of everything random.
        row: its name.
        column: which column is run.
        pools: ranks that are started once.
        minutes: after which no further trial is begun.
    """

    folder: Path
    seed: int
    row: str
    column: Column
    pools: RankPools
    minutes: float = math.inf

    def chance(self, *of: Any) -> random.Random:
        """Return the random numbers of a trial, the same in every run with this seed."""
        return random.Random(" ".join(map(str, (self.seed, self.row, *of))))

    def fresh(self, name: str) -> Path:
        """Return a new folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


Trials = Callable[[Bench, int], Iterator[Trial]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        name: ``R1`` … as in the table; those behind ``R17`` are ours.
        fault: what happens to the run.
        criterion: what must hold.
        run: yields trials; gets how many are wanted.
        ci: trials in the column of continuous integration; 0: as many as there are.
        release: trials in the release column; 0 likewise.
        allowed: share of trials that may fail.
        quick: trials of the smallest part, which runs in every test run; 0: none.
    """

    name: str
    fault: str
    criterion: str
    run: Trials
    ci: int = 0
    release: int = 0
    allowed: float = 0.0
    quick: int = 0

    def trials(self, column: Column) -> int:
        """Return how many trials a column asks for."""
        return self.ci if column == "ci" else self.release


@dataclass(kw_only=True)
class Tally:
    """What the trials of a row came to.

    Attributes:
        row: its name.
        trials: how many were made.
        failures: how many failed.
        told: what went wrong, of the first ones.
        seconds: that it took.
        skipped: why it was not run; "" if it was.
        cut: the clock has ended it.
    """

    row: str
    trials: int = 0
    failures: int = 0
    told: list[str] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""
    cut: bool = False

    def passed(self, row: Row) -> bool:
        """Whether the criterion is met by what was tried."""
        return self.trials > 0 and self.failures <= row.allowed * self.trials


def complete(row: Row, tally: Tally, column: Column) -> bool:
    """Whether a row had all the trials that its column asks for."""
    return not tally.cut and tally.trials >= max(row.trials(column), 1)


def run_row(row: Row, bench: Bench, trials: int) -> Tally:
    """Run a row; whatever its code raises is a failed trial and ends it."""
    tally, start = Tally(row=row.name), time.monotonic()
    try:
        for trial in row.run(bench, trials):
            tally.trials += trial.count
            tally.cut |= trial.cut
            if trial.failure is not None:
                tally.failures += 1
                tally.told = [*tally.told, trial.failure][:_TOLD]
            if not trial.made and time.monotonic() - start > 60 * bench.minutes:
                tally.cut |= trials == 0 or tally.trials < trials
                break
    except SkippedRowError as reason:
        tally.skipped = str(reason)
    except Exception:
        tally.trials += 1
        tally.failures += 1
        tally.told.append(traceback.format_exc(limit=-6))
    tally.seconds = time.monotonic() - start
    return tally


def attempt(trial: Callable[[], object]) -> Trial:
    """Make a trial of a function that raises where something is wrong."""
    try:
        trial()
    except SkippedRowError:
        raise
    except Exception:
        return Trial(failure=traceback.format_exc(limit=-4)[-3000:])
    return Trial()


def must(condition: object, what: str) -> None:
    """Check a condition of a trial (``assert`` is pytest's, and can be switched off)."""
    if not condition:
        raise AssertionError(what)
