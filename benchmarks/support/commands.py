"""Whole commands as contestants: what a user waits, what processors do, what memory it takes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.measure import Times, rounded, spread

ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 3000


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command took.

    Attributes:
        wall: seconds, from its start to its end.
        processor: seconds that it and the processes below it computed.
        peak: most bytes that they held together, looked at every 50 ms.
        output: what it printed.
        at: seconds until it printed what was waited for; ``nan`` if that was nothing.
    """

    wall: float
    processor: float
    peak: int
    output: str
    at: float = float("nan")


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    cores: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    until: str | None = None,
) -> Ran:
    """Run a command to its end.

    Args:
        command: program and arguments.
        cores: that it may use; None = all.
        environment: added to that of this process.
        until: text whose appearance in the output is timed.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    words = [os.fspath(word) for word in command]
    pin = None if cores is None else (lambda: os.sched_setaffinity(0, cores))
    peak, ended, at = [0], threading.Event(), [float("nan")]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=ROOT,
            preexec_fn=pin,
        )

        def watch() -> None:
            while not ended.wait(0.05):
                peak[0] = max(peak[0], sum(map(_resident, _tree(process.pid))))
                if until is not None and at[0] != at[0]:
                    size = os.fstat(output.fileno()).st_size
                    if until.encode() in os.pread(output.fileno(), size, 0):
                        at[0] = time.perf_counter() - started

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{text[-_SHOWN:]}")
    processor = usage.ru_utime + usage.ru_stime
    return Ran(wall=wall, processor=processor, peak=peak[0], output=text, at=at[0])


def race(contestants: Mapping[str, Callable[[], Ran]], *, turns: int) -> dict[str, list[Ran]]:
    """Let everyone run after the other; who begins changes from turn to turn."""
    names = list(contestants)
    found: dict[str, list[Ran]] = {name: [] for name in names}
    for turn in range(turns):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            found[name].append(contestants[name]())
            last = found[name][-1]
            print(
                f"turn {turn + 1}: {name}: {last.wall:.2f} s, processors {last.processor:.2f} s",
                flush=True,
            )
    return found


def times(runs: Sequence[Ran]) -> Times:
    """Return the seconds of some turns."""
    return Times(wall=[one.wall for one in runs], processor=[one.processor for one in runs])


def figures(runs: Sequence[Ran]) -> dict[str, Any]:
    """Return the spread of seconds, and the largest memory, of some turns."""
    return {
        "wall_seconds": spread([one.wall for one in runs]),
        "processor_seconds": spread([one.processor for one in runs]),
        "peak_bytes": rounded(max(one.peak for one in runs)),
    }


def _tree(process: int) -> Iterator[int]:
    yield process
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
