"""Starts one node's ranks like DeepSpeed's launcher, without its seconds of imports."""

import argparse
import base64
import json
import os
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--world_info")
parser.add_argument("--node_rank", type=int, default=0)
parser.add_argument("--master_addr")
parser.add_argument("--master_port")
parser.add_argument("--no_local_rank", action="store_true")
parser.add_argument("--module", action="store_true")
parser.add_argument("command", nargs=argparse.REMAINDER)
options = parser.parse_args()
world = list(json.loads(base64.urlsafe_b64decode(options.world_info)).values())
first = sum(map(len, world[: options.node_rank]))
children = []
for local in range(len(world[options.node_rank])):
    environment = {
        **os.environ,
        "RANK": str(first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(sum(map(len, world))),
        "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": options.master_port,
        "CROSS_RANK": str(options.node_rank),
    }
    arguments = [sys.executable, "-u", "-m", *options.command]
    children.append(subprocess.Popen(arguments, env=environment))
while any(child.poll() is None for child in children):
    time.sleep(0.05)
