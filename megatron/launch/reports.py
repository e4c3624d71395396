"""What a node's agent tells the parent of all nodes, in between the output of rank 0.

Remote shells of every kind carry an agent's standard output to where they were started, and
nothing else is sure to come through.  So reports are lines among that output::

    ::neomix NODE NUMBER PART/PARTS BASE64::

A report is a JSON object, cut into parts that are short enough to be written and passed on
in one piece, whatever other nodes write meanwhile.  Times are ages in seconds, since the
clocks of hosts differ.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.launch.outcome import RankEnd

_PART = 600
_LINE = re.compile(rb"::neomix (\d+) (\d+) (\d+)/(\d+) ([A-Za-z0-9+/=]+)::\r?\n")
_OPENING = b"::neomix "


def format_report(node: int, number: int, message: Mapping[str, Any]) -> bytes:
    """Return the lines that carry ``message``, the ``number``-th of ``node``."""
    word = base64.b64encode(json.dumps(message).encode())
    parts = [word[i : i + _PART] for i in range(0, len(word), _PART)]
    return b"".join(
        b"::neomix %d %d %d/%d %s::\n" % (node, number, index, len(parts), part)
        for index, part in enumerate(parts, start=1)
    )


class ReportReader:
    """Takes reports out of a stream of output."""

    def __init__(self) -> None:
        """Begin at the beginning of a stream."""
        self._held = b""
        self._parts: dict[tuple[int, int], dict[int, bytes]] = {}

    def feed(self, data: bytes) -> tuple[bytes, list[tuple[int, dict[str, Any]]]]:
        """Take a piece of the stream.

        Returns:
            What of it is output, and the reports that it completed, each with its node.
        """
        text, reports, output, end = self._held + data, [], b"", 0
        for match in _LINE.finditer(text):
            output += text[end : match.start()]
            end = match.end()
            node, number, index, count = (int(match.group(i)) for i in range(1, 5))
            parts = self._parts.setdefault((node, number), {})
            parts[index] = match.group(5)
            if len(parts) == count:
                whole = b"".join(parts[i] for i in sorted(parts))
                reports.append((node, json.loads(base64.b64decode(whole))))
                del self._parts[node, number]
        rest = text[end:]
        cut = _unfinished(rest)
        self._held = rest[cut:]
        return output + rest[:cut], reports

    def rest(self) -> bytes:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, b""
        return held


def _unfinished(text: bytes) -> int:
    """Return where the beginning of a report may stand at the end of ``text``."""
    found = text.rfind(_OPENING)
    if found >= 0 and len(text) - found < 2 * _PART and b"\n" not in text[found:]:
        return found
    for length in range(min(len(_OPENING), len(text)), 0, -1):
        if text.endswith(_OPENING[:length]):
            return len(text) - length
    return len(text)


def pack_ends(ends: Sequence[RankEnd]) -> list[dict[str, Any]]:
    """Write down how ranks ended."""
    now = time.monotonic()
    return [
        {
            "rank": end.rank,
            "code": end.code,
            "age": now - end.at,
            "tail": end.tail,
            "log": end.log,
            "seen": end.seen,
            "lost": end.lost,
        }
        for end in ends
    ]


def unpack_ends(entries: Sequence[Mapping[str, Any]], host: str) -> list[RankEnd]:
    """Return what :func:`pack_ends` wrote down on ``host``, in this process's time."""
    now = time.monotonic()
    return [
        RankEnd(
            rank=int(entry["rank"]),
            code=int(entry["code"]),
            at=now - float(entry["age"]),
            tail=[str(line) for line in entry["tail"]],
            log=str(entry["log"]),
            seen=bool(entry["seen"]),
            lost=bool(entry["lost"]),
            host=host,
        )
        for entry in entries
    ]
