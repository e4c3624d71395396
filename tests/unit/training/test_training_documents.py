"""Where documents end is known to the model before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import runs

import megatron.mixing  # noqa: F401
from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.training.check import preflight


def completed(folder: Path, **changes: Any) -> Any:
    content = runs.config(folder / "data", folder / "run", **changes)
    checked = preflight(
        load_config([str(runs.write_config(folder / "run.yml", content))]), world_size=2, gpus=0
    )
    checked.domains.close()
    return checked.config.model


def test_the_end_of_documents_comes_from_the_data(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data", documents=60)
    with pytest.raises(ConfigError, match="reset_attention_mask is on, but no domain's"):
        completed(tmp_path, reset_attention_mask=True)
    assert completed(tmp_path, reset_position_ids=True, eod_token_id=5).eod_token_id == 5
    runs.add_sidecars(tmp_path / "data")
    assert completed(tmp_path).eod_token_id is None
    assert completed(tmp_path, reset_attention_mask=True).eod_token_id == runs.EOD
    assert completed(tmp_path, reset_attention_mask=True, eod_token_id=7).eod_token_id == 7
    with pytest.raises(ConfigError, match="eod_token_id is 120, but there are 120 token ids"):
        completed(tmp_path, reset_attention_mask=True, eod_token_id=120)
