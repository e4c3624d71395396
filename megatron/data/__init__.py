"""Tokens on disk, domains, and the plan that turns sampling weights into batches.

The way of a sample: ``.bin/.idx`` (:mod:`~megatron.data.reader`) → domain
(:mod:`~megatron.data.domain`: windows, shuffle, split) → plan
(:mod:`~megatron.data.sampler`: which domain and which sample fill which slot of
the global batch) → micro-batches of one data-parallel rank
(:mod:`~megatron.data.loader`).  Everything is NumPy; nothing is cached on disk,
and the sample order is a pure function of (seed, step, weights, cursors).
"""
