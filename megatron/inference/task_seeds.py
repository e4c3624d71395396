"""The process's own generators as lm-eval's command line sets them, while tasks need them.

Some of lm-eval's tasks shuffle choices or pick documents by ``random`` or NumPy's global generator.
Their numbers can be compared only if those begin where lm-eval's own command line lets them begin.
Nothing of ours draws from these generators; whoever else does finds them as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_PYTHON, _NUMPY = 0, 1234  # lm-eval's defaults


@contextmanager
def task_seeds() -> Iterator[None]:
    """Set both generators, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(_PYTHON)
    np.random.seed(_NUMPY)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
