"""What flags may say: whole numbers, and nothing that has no effect beside the others."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from megatron.errors import ConfigError


def positive(text: str) -> int:
    """Read a whole number from 1 on.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def refuse_idle(
    options: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str], where: str
) -> None:
    """Refuse flags that have another value than they have by themselves.

    Args:
        options: as parsed.
        parser: that has the flags, and their default values.
        names: of the flags, without dashes.
        where: they would have an effect, for the message.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in names:
        key = name.replace("-", "_")
        value = getattr(options, key)
        if value != parser.get_default(key):
            raise ConfigError(f"--{name} {value}: it belongs to {where}; leave it out")
