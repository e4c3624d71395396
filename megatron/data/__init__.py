"""Tokens on disk, domains, and the plan that turns sampling weights into batches.

The way of a sample: ``.bin/.idx`` (:mod:`~megatron.data.reader`) → domain
(:mod:`~megatron.data.domain`: windows, shuffle, split) → plan
(:mod:`~megatron.data.sampler`: which domain and which sample fill which slot of
the global batch) → micro-batches of one data-parallel rank
(:mod:`~megatron.data.loader`).  Everything is NumPy; nothing is cached on disk,
and the sample order is a pure function of (seed, step, weights, cursors).
"""

from __future__ import annotations

from megatron.data.batch import MicroBatch
from megatron.data.domain import Domain, open_domain
from megatron.data.loader import Loader
from megatron.data.plan import EndOfData, Plan
from megatron.data.reader import TokenReader
from megatron.data.sampler import Sampler
from megatron.data.validation import ValidationSet
from megatron.data.writer import TokenWriter, merge

__all__ = [
    "Domain",
    "EndOfData",
    "Loader",
    "MicroBatch",
    "Plan",
    "Sampler",
    "TokenReader",
    "TokenWriter",
    "ValidationSet",
    "merge",
    "open_domain",
]
