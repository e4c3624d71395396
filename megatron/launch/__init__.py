"""Starting, watching and ending a run's processes; standard library only."""

from __future__ import annotations

from megatron.launch.lock import RunLock
from megatron.launch.process import die_with_parent
from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED, StopFlag

__all__ = ["EXIT_INTERRUPTED", "EXIT_SAVED", "RunLock", "StopFlag", "die_with_parent"]
