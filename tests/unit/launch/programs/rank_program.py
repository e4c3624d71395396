"""A rank without a model: behaves as its first argument says, and leaves notes in a folder."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron.launch.stop import StopFlag

behaviour, folder = sys.argv[1], Path(sys.argv[2])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def note(name: str, content: str = "") -> None:
    temporary = folder / f".{name}.{rank}"
    temporary.write_text(content)
    temporary.rename(folder / f"{name}.{rank}")


def wait_for(name: str, ranks: range) -> None:
    while not all((folder / f"{name}.{r}").exists() for r in ranks):
        time.sleep(0.01)


def fail(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def run(stop: StopFlag) -> int:
    print(f"rank {rank} of {size} says hello", flush=True)
    note("pid", str(os.getpid()))
    note("environment", json.dumps(dict(os.environ)))
    wait_for("pid", range(size))
    if behaviour == "finish":
        return 0
    if behaviour == "user-error":
        fail(2, "error: domain 'code': no such file")
    if behaviour == "last-rank-fails" and rank == size - 1:
        note("failed")
        fail(7, "error: the fuse of this rank is blown")
    if behaviour == "others-complain":
        if rank == size - 1:
            # Its message first, then a slow end, while the peer sees it go and ends at once.
            print("Traceback (most recent call last):\nValueError: blown", file=sys.stderr)
            sys.stderr.flush()
            note("failed")
            time.sleep(0.7)
            os._exit(7)
        wait_for("failed", range(size - 1, size))
        time.sleep(0.2)
        fail(1, "Traceback (most recent call last):\nRuntimeError: Connection closed by peer")
    if behaviour == "notice" and rank == 0:
        peer = int((folder / f"pid.{size - 1}").read_text())
        while "Z" not in Path(f"/proc/{peer}/stat").read_text().rpartition(")")[2]:
            pass
        fail(1, "Traceback (most recent call last):\nRuntimeError: Connection reset by peer")
    if behaviour == "die-by-default":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while not stop.requested or behaviour == "deaf":
        time.sleep(0.01)
    note("asked", str(stop.signal_name))
    if behaviour == "uneven" and rank != 0:
        wait_for("asked", range(size))
        time.sleep(float(os.environ.get("UNEVEN_SECONDS", "2")))
    elif behaviour != "uneven":
        # Nobody ends before all were asked: asking them one after another would hang here.
        wait_for("asked", range(size))
    note("saved")
    return stop.exit_code


if __name__ == "__main__":
    with StopFlag() as flag:
        code = run(flag)
        sys.stdout.flush()
        os._exit(code)
