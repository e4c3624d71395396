"""Hostfiles, and the choice of hosts and devices, in DeepSpeed's notation."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import ConfigError, did_you_mean

DEFAULT_HOSTFILE = "/job/hostfile"
LOCAL_NAMES = ("localhost", "127.0.0.1")
# A slot: the number of a device, or its UUID where the environment names it so.
Slot = int | str
World = dict[str, tuple[Slot, ...]]


def read_hostfile(path: str | None, environ: Mapping[str, str]) -> dict[str, int] | None:
    """Return the hosts and their slots in the order of the file; ``None`` without a hostfile.

    Args:
        path: the configured hostfile; ``None`` looks at ``DLTS_HOSTFILE``, then at
            ``/job/hostfile``.
        environ: the environment.

    Raises:
        ConfigError: it cannot be read, names no host, or a line is malformed.
    """
    named = path or environ.get("DLTS_HOSTFILE") or None
    file = Path(named or DEFAULT_HOSTFILE)
    if named is None and not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"hostfile {file} cannot be read: {error}; correct the path, or leave the key out"
        ) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"([\w.:-]+)\s+slots\s*=\s*([1-9]\d*)", content)
        if match is None or match.group(1).startswith("-") or match.group(1) in slots:
            raise ConfigError(
                f"{file}, line {number}: {content!r} should be 'HOST slots=N', each host once"
            )
        slots[match.group(1)] = int(match.group(2))
    if not slots:
        raise ConfigError(f"hostfile {file} names no host; write lines such as 'worker-0 slots=8'")
    return slots


def choose_hosts(
    available: Mapping[str, Sequence[Slot]], include: str | None, exclude: str | None
) -> World:
    """Return the hosts and slots that ``include`` and ``exclude`` leave.

    Args:
        available: slots by host.
        include: ``HOST[:SLOT,SLOT…][@HOST…]``: only these.
        exclude: the same form: all but these; a host without slots goes as a whole.

    Raises:
        ConfigError: both are given, the form is wrong, a host or device is not there, or
            nothing is left.
    """
    if include and exclude:
        raise ConfigError("include and exclude are both given; give one of them")
    if not include and not exclude:
        return {host: tuple(slots) for host, slots in available.items()}
    key, text = ("include", include) if include else ("exclude", exclude or "")
    named = _parse(key, str(text), available)
    chosen: World = {}
    for host, slots in available.items():
        if key == "include":
            left = (named[host] or tuple(slots)) if host in named else ()
        else:
            gone = named.get(host, ())
            whole = host in named and not gone
            left = () if whole else tuple(slot for slot in slots if slot not in gone)
        if left:
            chosen[host] = left
    if not chosen:
        raise ConfigError(f"{key} is {text!r}, which leaves no device")
    return chosen


def limit(world: Mapping[str, Sequence[Slot]], nodes: int | None, per_node: int | None) -> World:
    """Return the first ``nodes`` hosts of a world with the first ``per_node`` slots of each.

    Raises:
        ConfigError: there are not that many.
    """
    if nodes is not None and nodes > len(world):
        raise ConfigError(
            f"num_nodes is {nodes}, but {_count(len(world), 'host')} can be used "
            f"({_shorten(list(world))}); lower it, or add hosts to the hostfile"
        )
    kept = list(world.items())[: nodes or len(world)]
    for host, slots in kept:
        if per_node is not None and per_node > len(slots):
            raise ConfigError(
                f"num_gpus is {per_node}, but host {host} has {_count(len(slots), 'slot')}; lower "
                "it, or correct the hostfile"
            )
    return {host: tuple(slots[: per_node or len(slots)]) for host, slots in kept}


def format_world(world: Mapping[str, Sequence[Slot]]) -> str:
    """Write a world as ``HOST:SLOT,SLOT@HOST:…``, the form that :func:`parse_world` reads."""
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in world.items())


def parse_world(text: str) -> World:
    """Return the world that :func:`format_world` wrote."""
    world: World = {}
    for part in text.split("@"):
        host, _, listed = part.rpartition(":")
        world[host] = tuple(int(s) if s.isdigit() else s for s in listed.split(","))
    return world


def is_local(host: str) -> bool:
    """Tell whether ``host`` is a name or address of this machine."""
    own = socket.gethostname()
    if host in (*LOCAL_NAMES, own) or host == own.partition(".")[0]:
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)  # works for an address of this machine alone
                return True
            except OSError:
                continue
    return False


def _parse(
    key: str, text: str, available: Mapping[str, Sequence[Slot]]
) -> dict[str, tuple[Slot, ...]]:
    named: dict[str, tuple[Slot, ...]] = {}
    for part in text.split("@"):
        written, _, listed = part.strip().partition(":")
        host = _find_host(written, available)
        if host is None:
            raise ConfigError(
                f"{key} is {text!r}, but {written!r} is none of the hosts "
                f"({_shorten(list(available))}){did_you_mean(written, list(available))}"
            )
        known = {str(slot): slot for slot in available[host]}
        slots = [word.strip() for word in listed.split(",")] if listed else []
        if host in named or len(set(slots)) != len(slots) or not set(slots) <= set(known):
            place = "the visible devices" if host == "localhost" else f"the slots of {host}"
            raise ConfigError(f"{key} is {text!r}, but {place} are {', '.join(known)} (each once)")
        named[host] = tuple(known[slot] for slot in slots)
    return named


def _find_host(written: str, available: Mapping[str, Sequence[Slot]]) -> str | None:
    if written in available:
        return written
    if len(available) == 1 and written and is_local(written):
        only = next(iter(available))
        return only if is_local(only) else None
    return None


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])}, … {names[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
