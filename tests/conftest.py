"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.pool import RankPools


def pytest_configure(config: pytest.Config) -> None:
    """Watch what the tests connect to; workers are watched as children are."""
    from support.network_watch import SessionWatch

    # Reference models load tasks without what keeps our own evaluation from being counted.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SessionWatch())


@pytest.fixture(scope="session")
def pools() -> Iterator[RankPools]:
    """Ranks that are started once in a session; see :mod:`support.pool`."""
    from support.pool import RankPools

    started = RankPools()
    yield started
    started.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers a file's tests stay together, but for rows of faults: each is long."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            alone = nodeid.startswith("tests/campaign/")
            return nodeid if alone else super()._split_scope(nodeid)

    return Scheduling(config, log)
