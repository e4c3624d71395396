"""Made-up nodes are looked up nowhere."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def own_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine's names and all addresses be found, and no other name."""
    find = socket.getaddrinfo
    own = ("localhost", socket.gethostname())

    def found(host: str, *arguments: Any, **named: Any) -> Any:
        if host not in own:
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
        return find(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", found)
