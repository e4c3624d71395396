"""Does what deepy.py does once it has a configuration that names several hosts."""

import argparse
import os
import sys
from pathlib import Path

from megatron.errors import run_command
from megatron.launch.command import plan_launch
from megatron.launch.devices import Devices
from megatron.launch.request import LaunchRequest
from megatron.launch.start import start

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("behaviour")
    parser.add_argument("--launcher", default="pdsh")
    parser.add_argument("--hostfile")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--save-timeout", type=float, default=60.0)
    options = parser.parse_args()
    plan = plan_launch(
        HERE / "rank_program.py",
        [options.behaviour, str(options.folder)],
        LaunchRequest(
            launcher=options.launcher,
            hostfile=options.hostfile,
            num_nodes=options.nodes,
            num_gpus=options.gpus,
            force_multi=True,
        ),
        environ=os.environ,
        devices=Devices(cuda=(), cores=2),
        log_dir=options.folder / "logs",
        save_timeout=options.save_timeout,
    )
    return start(plan, options.folder, options.folder / "logs", save_timeout=options.save_timeout)


if __name__ == "__main__":
    sys.exit(run_command(main))
