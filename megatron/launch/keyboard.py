"""What is typed at ``deepy.py``, for rank 0, whose own standard input is closed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROMPTS_VARIABLE = "NEOMIX_PROMPTS"


@contextmanager
def passed_on(folder: Path) -> Iterator[None]:
    """Pass standard input on through a named pipe in ``folder`` that ranks are told of."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = folder / f"prompts-{os.getpid()}"
    os.mkfifo(pipe, 0o600)
    os.environ[PROMPTS_VARIABLE] = str(pipe.absolute())
    threading.Thread(target=_copy, args=(pipe,), daemon=True).start()
    try:
        yield
    finally:
        del os.environ[PROMPTS_VARIABLE]
        pipe.unlink(missing_ok=True)


def _copy(pipe: Path) -> None:
    try:
        with open(pipe, "wb", buffering=0) as target:  # waits for the reader
            while data := os.read(sys.stdin.fileno(), 65536):
                target.write(data)
    except OSError:
        return  # the reader has gone
