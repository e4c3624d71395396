"""Ask the agent of one node to save and stop: ``python -m megatron.launch.tell JOB NODE``.

pdsh passes no signals on, so the parent runs this on every host, by another pdsh.
"""

from __future__ import annotations

import signal
import sys

from megatron.launch import wire


def address(job: str, node: int) -> str:
    """Return the name of the socket of a node's agent."""
    return f"neomix-{job}-{node}"


def main(arguments: list[str]) -> int:
    """Tell it; an agent that is not there (yet, or any more) is no error."""
    job, node = arguments
    with wire.make_socket() as connection:
        try:
            connection.connect("\0" + address(job, int(node)))
            wire.send(connection, {"stop": int(signal.SIGTERM)})
        except OSError:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
