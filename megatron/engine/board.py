"""A notice board that ranks can write on and read while their collectives hang."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class NoticeBoard:
    """One line of text per rank, held by the process that every rank found the others through.

    It has a connection of its own, since that of the process groups is busy for as long as
    one of them is being set up.  Whatever takes longer than ``patience`` counts as no answer:
    the holder (rank 0) may itself be the process that is stuck.
    """

    def __init__(self, rank: int, world_size: int, *, patience: float = 10.0) -> None:
        """Connect, once the process groups are there.

        Args:
            rank: this process.
            world_size: number of ranks.
            patience: seconds after which there is no answer.
        """
        self._rank = rank
        self._world_size = world_size
        self._patience = patience
        self._stuck = False
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience),
        )

    def publish(self, text: str) -> bool:
        """Write this rank's line; return whether that worked."""

        def write() -> bool:
            self._store.set(_key(self._rank), text)
            return True

        return self._within(write, False)

    def read(self) -> list[str | None]:
        """Return every rank's line; ``None`` where there is none, or no answer."""
        nothing: list[str | None] = [None] * self._world_size
        return self._within(self._read, nothing)

    def _read(self) -> list[str | None]:
        lines: list[str | None] = []
        for rank in range(self._world_size):
            there = self._store.check([_key(rank)])
            lines.append(self._store.get(_key(rank)).decode() if there else None)
        return lines

    def _within(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """Return what ``work`` returns, or ``otherwise`` if it fails or takes too long."""
        if self._stuck:
            return otherwise
        result = [otherwise]

        def run() -> None:
            try:
                result[0] = work()
            except (RuntimeError, OSError):  # torch's errors of a store are RuntimeErrors
                return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self._patience + 0.01 * self._world_size)
        # A thread that hangs holds the connection: nothing else can be asked over it.
        self._stuck = thread.is_alive()
        return otherwise if self._stuck else result[0]


def _key(rank: int) -> str:
    return f"neomix/place/{rank}"
