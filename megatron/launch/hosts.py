"""Hostfiles, and the choice of devices on a host, in DeepSpeed's notation."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import ConfigError

DEFAULT_HOSTFILE = "/job/hostfile"


def read_hostfile(path: str | None, environ: Mapping[str, str]) -> int | None:
    """Return this node's slots by the hostfile, or ``None`` if there is no hostfile.

    Args:
        path: the configured hostfile; ``None`` looks at ``DLTS_HOSTFILE``, then at
            ``/job/hostfile``.
        environ: the environment.

    Raises:
        ConfigError: it cannot be read, a line is malformed, or it names several hosts.
    """
    named = path or environ.get("DLTS_HOSTFILE") or None
    file = Path(named or DEFAULT_HOSTFILE)
    if named is None and not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {file} cannot be read: {error}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9]\d*)", content)
        if match is None or match.group(1) in slots:
            raise ConfigError(
                f"{file}, line {number}: {content!r} should be 'HOST slots=N', each host once"
            )
        slots[match.group(1)] = int(match.group(2))
    if len(slots) != 1:
        raise ConfigError(
            f"hostfile {file} names {len(slots)} hosts: this release starts ranks on one node; "
            "leave one line, or start train.py on every node with torchrun"
        )
    return next(iter(slots.values()))


def choose_slots(
    available: Sequence[int | str], include: str | None, exclude: str | None
) -> list[int | str]:
    """Return the devices of this node that ``include`` and ``exclude`` leave.

    Args:
        available: ids of the visible devices.
        include: ``localhost:0,2`` (or this host's name): only these.
        exclude: the same form: all but these.

    Raises:
        ConfigError: both are given, the form is wrong, or a device is not there.
    """
    if include and exclude:
        raise ConfigError("include and exclude are both given; give one of them")
    key, text = ("include", include) if include else ("exclude", exclude or "")
    host, _, listed = text.partition(":")
    if "@" in text or host not in ("localhost", "127.0.0.1", socket.gethostname()):
        raise ConfigError(
            f"{key} is {text!r}: this release starts ranks on this node only; "
            "write it as localhost:0,1"
        )
    named = [part.strip() for part in listed.split(",")] if listed else []
    known = {str(slot): slot for slot in available}
    strangers = [name for name in named if name not in known]
    if strangers or len(set(named)) != len(named):
        raise ConfigError(
            f"{key} is {text!r}, but the visible devices are {', '.join(known)} (each once)"
        )
    if key == "include":
        return [known[name] for name in named] or list(available)
    left = [slot for name, slot in known.items() if named and name not in named]
    if not left:
        raise ConfigError(f"exclude is {text!r}, which leaves no device")
    return left
