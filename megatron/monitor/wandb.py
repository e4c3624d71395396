"""Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, MissingExtraError
from megatron.monitor.charts import ChartSink, Scalars
from megatron.monitor.identity import stored_identity

DEFAULT_HOST = "https://api.wandb.ai"
IDENTITY = "wandb_run_id"


class WandbSink(ChartSink):
    """Records to Weights & Biases, on line or off line as ``WANDB_MODE`` says."""

    def __init__(
        self,
        run_dir: Path | str,
        *,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        host: str | None = None,
        log_interval: int = 1,
    ) -> None:
        """Record the run of ``run_dir`` under ``entity/project``."""
        super().__init__(log_interval=log_interval)
        # It would report its own errors to its maker's server.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", "use_wandb") from error
        self._wandb: Any = wandb
        self._dir = Path(run_dir)
        self._options = {"project": project, "entity": entity, "group": group, "name": name}
        self._host = None if host in (None, DEFAULT_HOST) else host
        self._run: Any = None

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one whose identity the run folder holds.

        Points that were sent before the interruption and are reached again have
        the same values; the service keeps the first.

        Raises:
            ConfigError: the service refuses (no login, unknown project).
        """
        identity, known = stored_identity(
            self._dir / IDENTITY, lambda: uuid.uuid4().hex[:16], resume=resume_step is not None
        )
        settings: dict[str, Any] = {"console": "off", "silent": True}
        if self._host is not None:
            settings["base_url"] = self._host
        try:
            self._run = self._wandb.init(
                id=identity,
                resume="allow" if known else None,
                dir=str(self._dir),
                config=info.get("config"),
                settings=self._wandb.Settings(**settings),
                **self._options,
            )
        except self._wandb.Error as error:
            raise ConfigError(
                f"use_wandb: Weights & Biases did not start: {error}; log in with 'wandb login', "
                "or set WANDB_MODE=offline and send the run later with 'wandb sync'"
            ) from error

    def emit(self, scalars: Scalars, step: int) -> None:
        """Send the points."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
