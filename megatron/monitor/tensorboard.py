"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import MissingExtraError
from megatron.monitor.charts import ChartSink, Scalars


class TensorBoardSink(ChartSink):
    """Writes event files."""

    def __init__(self, directory: Path | str, *, log_interval: int = 1) -> None:
        """Write into ``directory``."""
        super().__init__(log_interval=log_interval)
        self._dir = Path(directory)
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "use_tensorboard") from error
        self._make = SummaryWriter

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Open a new event file; on resume the points after ``resume_step`` are hidden."""
        purge = None if resume_step is None else resume_step + 1
        self._writer = self._make(log_dir=str(self._dir), purge_step=purge)

    def emit(self, scalars: Scalars, step: int) -> None:
        """Write the points."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand the events to the operating system."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
