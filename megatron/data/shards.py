"""Contiguous parts of a corpus for several processes, and what a user calls them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from megatron.errors import ConfigError

SLURM: Final = "slurm"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several equal parts.

    Attributes:
        index: from 0.
        count: of all.
    """

    index: int = 0
    count: int = 1

    def range(self, total: int) -> range:
        """Return which of ``total`` things in a row are its own."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def __str__(self) -> str:
        """Return it as the user writes it."""
        return f"{self.index}/{self.count}"


def stretches(shard: Shard, sizes: Sequence[int]) -> list[range]:
    """Return which part of each of several things, laid end to end, is a shard's own.

    Args:
        shard: which part of all.
        sizes: of each thing.
    """
    own = shard.range(sum(sizes))
    found, before = [], 0
    for size in sizes:
        start, stop = (min(max(at - before, 0), size) for at in (own.start, own.stop))
        found.append(range(start, stop))
        before += size
    return found


def parse_shard(text: str | None, environment: Mapping[str, str] | None = None) -> Shard:
    """Read ``--shard``: ``i/n`` with i from 0, or ``slurm``, this task of a SLURM array.

    Args:
        text: as given; None = there is one part.
        environment: of the process; None = the real one.

    Raises:
        ConfigError: it is neither, or there is no array.
    """
    if text is None:
        return Shard()
    if text == SLURM:
        return _of_slurm(os.environ if environment is None else environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ConfigError(f"--shard {text}: write i/n, such as 0/4, or {SLURM}")
    index, count = int(found[1]), int(found[2])
    if not index < count:
        raise ConfigError(
            f"--shard {text}: shards are numbered from 0: 0/{max(count, 1)} to "
            f"{max(count, 1) - 1}/{max(count, 1)}"
        )
    return Shard(index=index, count=count)


def _of_slurm(environment: Mapping[str, str]) -> Shard:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    try:
        task, count = (int(environment[name]) for name in names)
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    except (KeyError, ValueError):
        raise ConfigError(
            f"--shard {SLURM}: {' and '.join(names)} are not set; submit the command as a job "
            "array (sbatch --array=0-7), or write --shard i/n"
        ) from None
    index = (task - first) // max(step, 1)
    if not 0 <= index < count:
        raise ConfigError(
            f"--shard {SLURM}: task {task} of {count} from {first} on; use an array without gaps "
            "(--array=0-7)"
        )
    return Shard(index=index, count=count)
