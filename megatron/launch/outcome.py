"""How a job ended, from how its ranks ended: the exit code and the last words."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED

EXIT_KILLED = 128 + int(signal.SIGKILL)
# Signals that a process does not get from a peer's end (SIGABRT, say, it may).
_BLOWS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_PEER_GONE = re.compile(r"(reset|closed) by peer|Broken pipe|remote process exited|NCCL.*remote")
SAVED_CODES = frozenset({EXIT_SAVED, EXIT_INTERRUPTED})


@dataclass(kw_only=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: its number.
        code: exit code; −n after signal n.
        at: when its trouble began, in seconds of the monotonic clock.
        tail: its last lines of output.
        log: file that holds its output.
        seen: whether its output went to the user as it came.
        lost: whether its guardian vanished without a report (killed, with its rank).
        host: where it ran, if that is not this host alone.
    """

    rank: int
    code: int
    at: float
    tail: list[str] = field(default_factory=list)
    log: str = ""
    seen: bool = False
    lost: bool = False
    host: str = ""

    @property
    def name(self) -> str:
        """How it is called: by its number, and by its host where there are several."""
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    @property
    def exit_code(self) -> int:
        """The code as a shell gives it: 128 + n after signal n."""
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def failed(self) -> bool:
        """Whether it neither finished nor saved and stopped."""
        return self.code != 0 and self.code not in SAVED_CODES

    def last_words(self) -> str:
        """Its last line that is not blank."""
        return next((line.strip() for line in reversed(self.tail) if line.strip()), "")


def culprit(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Return the rank that decides the exit code: the first that failed, else that stopped.

    A rank that was killed comes before ranks with errors of their own, and ranks that
    only complain that another one is gone come last: those are consequences, and may be
    noticed a moment before their cause.
    """
    failed = [end for end in ends if end.failed]
    stopped = [end for end in ends if end.code in SAVED_CODES]
    return min(failed or stopped, key=_precedence, default=None)


def _precedence(end: RankEnd) -> tuple[bool, bool, float]:
    killed = -end.code in _BLOWS
    return not killed, bereft(end), end.at


def bereft(end: RankEnd) -> bool:
    """Tell whether a rank's last words only say that another one is gone."""
    return any(_PEER_GONE.search(line) for line in end.tail[-3:])


def explain(end: RankEnd, ends: Sequence[RankEnd]) -> list[str]:
    """Return the lines to end with, so that the failed rank's own message is the last one.

    Nothing is said again that the user has just read: the output of a rank that is shown
    live, or a message that such a rank gave as well (an error that all ranks agree on).
    """
    if not end.failed:
        return []
    if end.code < 0:
        name = _signal_name(-end.code)
        hint = " (often the kernel, out of memory)" if -end.code == signal.SIGKILL else ""
        return [f"deepy: {end.name} was killed by {name}{hint}; its output: {end.log}"]
    shown = any(
        other.seen and other.code == end.code and other.last_words() == end.last_words()
        for other in ends
    )
    if shown and end.last_words():
        return []
    head = f"deepy: {end.name} failed with exit code {end.code}"
    if not end.last_words():
        return [f"{head} and said nothing; its output: {end.log}"]
    mark = f"{end.host}: " if end.host else ""
    words = [f"{mark}{line}" for line in _last_block(end.tail)]
    return [f"{head}; its last words (all of them: {end.log}):", *words]


def _last_block(tail: Sequence[str]) -> list[str]:
    """Return the tail from its last traceback on, or its last lines."""
    starts = [i for i, line in enumerate(tail) if line.startswith("Traceback (most recent")]
    return list(tail[starts[-1] :] if starts else tail[-20:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
