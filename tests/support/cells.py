"""Cells of the tests that go through layouts."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """A layout and a ZeRO stage."""

    tensor: int
    pipe: int
    data: int
    stage: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipe * self.data

    def __str__(self) -> str:
        return f"tensor{self.tensor}-pipe{self.pipe}-data{self.data}-zero{self.stage}"
