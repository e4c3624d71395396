"""Starts ranks like DeepSpeed's launcher, without its seconds of imports.

As there: one child per rank; when one fails, the others get SIGTERM one after another, with
words about it; SIGTERM and SIGINT do the same.
"""

import os
import signal
import subprocess
import sys
import time

ranks, command = int(sys.argv[1]), sys.argv[2:]
children = []
for rank in range(ranks):
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(ranks)))
    arguments = [sys.executable, "-u", "-m", "megatron.launch.rank", *command]
    children.append(subprocess.Popen(arguments, env=environment))


def kill_all(code: int) -> None:
    for child in children:
        print("launcher chatter: Killing subprocess", child.pid, flush=True)
        child.terminate()
        try:
            child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            child.kill()
    print("launcher chatter: exits with return code", code, file=sys.stderr, flush=True)
    sys.exit(code)


signal.signal(signal.SIGTERM, lambda *_: kill_all(1))
signal.signal(signal.SIGINT, lambda *_: kill_all(1))
while any(child.poll() is None for child in children):
    for child in children:
        if child.poll():
            kill_all(child.returncode)
    time.sleep(0.1)
