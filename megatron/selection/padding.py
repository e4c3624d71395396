"""Rows of tokens as one tensor, and losses as rows again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron.selection.language_model import Ids, Losses


def pad_rows(rows: Sequence[Ids]) -> torch.Tensor:
    """Return int64 [n, longest], each row filled up at its end with token 0."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


def cut_rows(losses: torch.Tensor, rows: Sequence[Ids]) -> list[Losses]:
    """Return of each row of losses what belongs to its tokens, all but the first of them."""
    found = losses.double().cpu().numpy()
    return [found[number, : len(row) - 1] for number, row in enumerate(rows)]
