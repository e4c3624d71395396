"""What a run's supervisor and the guardians of its ranks say to each other.

They talk over a Unix socket that keeps messages apart, with an abstract name: it
disappears with the supervisor, however that ends.  One message is one JSON object:

=========  ===================================================  =========================
sender     message                                              meaning
=========  ===================================================  =========================
guardian   ``{"hello": rank, "pid": pid}``                      here I am
supervisor ``{"launcher": pid, "log": path, "live": bool}``     start your rank (with the
                                                                supervisor's stdout and
                                                                stderr as descriptors)
guardian   ``{"started": pid}``                                 the rank runs
guardian   ``{"ended": code, "at": time, "tail": lines}``       the rank has ended
supervisor ``{"leave": true}``                                  end with your rank's code
anyone     ``{"stop": signal}`` (:mod:`megatron.launch.tell`)   save and stop
=========  ===================================================  =========================
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

SUPERVISOR_VARIABLE = "NEOMIX_SUPERVISOR"
MESSAGE_BYTES = 65536


def supervised() -> bool:
    """Tell whether this process is a rank that ``deepy.py`` watches (and whose folder it locks)."""
    return bool(os.environ.get(SUPERVISOR_VARIABLE))


def make_socket() -> socket.socket:
    """Return a new socket of the kind that both sides use."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, message: Mapping[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message, with copies of the file descriptors ``fds``."""
    socket.send_fds(connection, [json.dumps(message).encode()], list(fds))


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message and its descriptors; ``None`` if the other side is gone."""
    try:
        raw, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
    except ConnectionError:
        return None, []
    return (json.loads(raw) if raw else None), fds


def same_user(connection: socket.socket) -> bool:
    """Tell whether the other side runs as this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())
