"""Mixers of every method for tests that are the same for all of them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import reject

from data_sampling_utils import Mixer, available_methods, build_mixer

ALONE = [method for method in available_methods() if method != "aioli"]
"""The methods that take a single domain."""
HELD_OUT = {"aioli", "dynamic_loading", "naive_validation", "skillit"}
"""The methods whose estimates move with held-out losses alone."""
LEDGERS = {"replay", "average_of_ledger"}


def build_any(method: str, *, domains: list[str], **arguments: Any) -> Mixer:
    """Build a mixer with what its method cannot go without, as small as it goes."""
    if method == "aioli":
        if len(domains) < 2:
            reject()
        every = arguments.pop("update_every", 1) + len(domains)
        arguments |= {"lp_rounds": 1, "lp_steps": 1, "update_every": every}
    elif method == "dynamic_loading":
        arguments.setdefault("targets", [1.0] * len(domains))
    elif method in LEDGERS:
        weights = list(arguments.get("weights") or [1.0] * len(domains))
        total = sum(weights)
        row = dict(zip(domains, [float(weight) / total for weight in weights], strict=True))
        arguments["ledger"] = _ledger(json.dumps(row))
    return build_mixer(method, domains=domains, **arguments)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ledgers-")


@functools.cache
def _ledger(row: str) -> str:
    path = Path(_folder().name) / f"{abs(hash(row))}.jsonl"
    path.write_text(f'{{"step": 1, "probability": {row}}}\n')
    return str(path)
