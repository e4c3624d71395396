"""Ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.pool import RankPools


@pytest.fixture(scope="session")
def pools() -> Iterator[RankPools]:
    """Ranks that are started when first asked for, and serve one case after the other."""
    pools = RankPools()
    yield pools
    pools.close()
