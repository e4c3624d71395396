"""The one place where torch's untyped ``Function.apply`` is called."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``."""
    untyped: Any = function
    return untyped.apply(*arguments)
