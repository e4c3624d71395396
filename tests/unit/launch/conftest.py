"""Made-up nodes are looked up nowhere."""

from __future__ import annotations

from support.own_names import own_names_only

__all__ = ["own_names_only"]
