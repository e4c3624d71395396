"""Which layouts can be converted into each other."""

from __future__ import annotations

import pytest

from megatron.engine.universal import check_convertible
from megatron.errors import CheckpointError


@pytest.mark.parametrize(
    ("saved", "wanted"), [(1, 2), (2, 1), (1, 1), (3, 3), (3, 1), (1, 3), (2, 3)]
)
def test_stages_that_convert(saved: int, wanted: int) -> None:
    check_convertible({"zero_stage": saved}, {"zero_stage": wanted})


@pytest.mark.parametrize(("saved", "wanted"), [(0, 1), (1, 0), (0, 0)])
def test_stage_0_has_no_universal_format(saved: int, wanted: int) -> None:
    with pytest.raises(CheckpointError, match="ZeRO stage 0"):
        check_convertible({"zero_stage": saved}, {"zero_stage": wanted})
