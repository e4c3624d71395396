"""The words in which a policy for spikes of the loss is given."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from megatron.config.base import Text

SpikeReaction = Literal["off", "warn", "stop", "skip", "rollback"]

_POLICY = re.compile(r"(off|warn|stop)|(skip|rollback)\(([1-9][0-9]{0,8})\)")
_PATTERN = r"^\s*([oO]ff|[wW]arn|[sS]top|([sS]kip|[rR]ollback)\([1-9][0-9]*\))\s*$"


def _policy(value: Any) -> Any:
    if value is False:  # what YAML makes of an unquoted off
        return "off"
    if not isinstance(value, str):
        return value
    text = value.replace(" ", "").lower()
    if _POLICY.fullmatch(text):
        return text
    raise PydanticCustomError(
        "on_loss_spike", "should be 'off', 'warn', 'stop', 'skip(k)' or 'rollback(k)'"
    )


SpikePolicy = Annotated[
    Text,
    BeforeValidator(_policy),
    WithJsonSchema({"anyOf": [{"const": False}, {"type": "string", "pattern": _PATTERN}]}),
]
"""One of the reactions, the last two with a number."""


def split_policy(policy: str) -> tuple[SpikeReaction, int]:
    """Return a policy's reaction and its k; 0 where it has none."""
    match = _POLICY.fullmatch(policy)
    assert match is not None, policy
    plain, counted, limit = match.groups()
    return cast(SpikeReaction, plain or counted), int(limit or 0)
