"""What became of every key of GPT-NeoX and of its online-data-mixing fork, one verdict a key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from megatron.config.canonical import accepted_keys
from megatron.config.neox import REFUSED, WITHOUT_EFFECT
from megatron.config.schema import MAPPED

State = Literal["works", "mapped", "no effect", "refused"]
SYSTEMS = ("online-data-mixing", "gpt-neox")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one key.

    Attributes:
        state: whether it works, is mapped onto another, has no effect, or is refused.
        text: our field; what it is mapped onto; why it has no effect or is refused, and what
            to do instead.
    """

    state: State
    text: str

    @property
    def promised(self) -> bool:
        """Whether the key does something, which a test must show."""
        return self.state in ("works", "mapped")


@cache
def upstream_keys() -> dict[str, dict[str, tuple[str, str, Any]]]:
    """Return the keys of both systems: by name their group, type and default."""
    text = resources.files("megatron.config").joinpath("neox_keys.json").read_text("utf-8")
    return {
        system: {key: (group, kind, default) for key, (group, kind, default) in keys.items()}
        for system, keys in json.loads(text).items()
    }


def verdict(key: str) -> Verdict:
    """Tell what becomes of a key.

    Raises:
        KeyError: it is in none of the tables.
    """
    if key in REFUSED:
        refusal = REFUSED[key]
        kept = ", ".join(f"`{json.dumps(value)}`" for value in refusal.neutral)
        accepted = f" (accepted: {kept})" if kept else ""
        return Verdict(state="refused", text=f"{refusal.instead}{accepted}")
    if key in WITHOUT_EFFECT:
        return Verdict(state="no effect", text=WITHOUT_EFFECT[key])
    if key in MAPPED:
        return Verdict(state="mapped", text=MAPPED[key])
    if key in accepted_keys():
        return Verdict(state="works", text=f"`{key}`")
    raise KeyError(key)
