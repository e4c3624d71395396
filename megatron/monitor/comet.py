"""Comet."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, MissingExtraError
from megatron.monitor.charts import ChartSink, Scalars
from megatron.monitor.identity import stored_identity

IDENTITY = "comet_experiment_key"


class CometSink(ChartSink):
    """Records to Comet; with ``COMET_MODE=offline`` into an archive in the run folder."""

    def __init__(
        self,
        run_dir: Path | str,
        *,
        project: str | None = None,
        workspace: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        others: Mapping[str, Any] | None = None,
        log_interval: int = 1,
    ) -> None:
        """Record the run of ``run_dir`` under ``workspace/project``."""
        super().__init__(log_interval=log_interval)
        # We send our own records; without this Comet patches torch and warns about import order.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        # Every second start it would report its own errors to its maker's server, off line too.
        os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "false")
        try:
            import comet_ml
        except ImportError as error:
            raise MissingExtraError("comet_ml", "comet", "use_comet") from error
        self._comet: Any = comet_ml
        self._dir = Path(run_dir)
        self._project = project
        self._workspace = workspace
        self._name = name
        self._tags = list(tags)
        self._others = dict(others or {})
        self._experiment: Any = None

    def open(self, resume_step: int | None, info: Mapping[str, Any]) -> None:
        """Start the experiment, or go on with the one whose key the run folder holds.

        Raises:
            ConfigError: the service refuses (no API key, unknown workspace).
        """
        key, known = stored_identity(
            self._dir / IDENTITY, lambda: uuid.uuid4().hex, resume=resume_step is not None
        )
        # Only our own records: the console is ours, and nothing of the code or machine is sent.
        options = self._comet.ExperimentConfig(
            name=self._name,
            tags=self._tags,
            offline_directory=str(self._dir / "comet"),
            auto_output_logging=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            auto_log_co2=False,
            log_code=False,
            log_graph=False,
            log_git_metadata=False,
            log_git_patch=False,
            log_env_details=False,
            parse_args=False,
            display_summary_level=0,
        )
        try:
            self._experiment = self._comet.start(
                workspace=self._workspace,
                project_name=self._project,
                experiment_key=key,
                mode="get_or_create" if known else "create",
                online=not offline(),
                experiment_config=options,
            )
        except (ValueError, RuntimeError, self._comet.exceptions.CometException) as error:
            raise ConfigError(
                f"use_comet: Comet did not start: {error}; log in with 'comet login', or set "
                "COMET_MODE=offline and send the experiment later with 'comet upload'"
            ) from error
        self._experiment.log_others(self._others)
        if info.get("config"):
            self._experiment.log_parameters(dict(info["config"]))

    def emit(self, scalars: Scalars, step: int) -> None:
        """Send the points."""
        self._experiment.log_metrics(scalars, step=step)

    def flush(self) -> None:
        """Wait until what was sent has been taken."""
        if self._experiment is not None and not offline():
            self._experiment.flush()

    def close(self) -> None:
        """End the experiment."""
        if self._experiment is not None:
            self._experiment.end()
            self._experiment = None


def offline() -> bool:
    """Tell whether the environment asks for an offline experiment."""
    return os.environ.get("COMET_MODE", "").lower() == "offline" or os.environ.get(
        "COMET_START_ONLINE", ""
    ).lower() in ("0", "false", "no")
