"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.pool import RankPools


@pytest.fixture(scope="session")
def pools() -> Iterator[RankPools]:
    """Ranks that are started once in a session; see :mod:`support.pool`."""
    from support.pool import RankPools

    started = RankPools()
    yield started
    started.close()
