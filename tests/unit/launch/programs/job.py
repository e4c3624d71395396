"""Does what deepy.py does once it has a configuration: lock the folder, supervise the ranks."""

import argparse
import os
import sys
from pathlib import Path

from megatron.errors import run_command
from megatron.launch.command import LaunchPlan, LaunchRequest, plan_launch
from megatron.launch.devices import Devices
from megatron.launch.lock import RunLock
from megatron.launch.supervise import supervise

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("behaviour")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--save-timeout", type=float, default=60.0)
    parser.add_argument("--grace", type=float, default=1.5)
    parser.add_argument("--broken", action="store_true")
    options = parser.parse_args()
    plan = plan_launch(
        HERE / "rank_program.py",
        [options.behaviour, str(options.folder)],
        LaunchRequest(num_gpus=options.ranks),
        environ=os.environ,
        devices=Devices(cuda=(), cores=2),
    )
    assert isinstance(plan, LaunchPlan)
    if not options.real:
        program = plan.command[plan.command.index("megatron.launch.rank") + 1 :]
        launcher = (sys.executable, str(HERE / "standin_launcher.py"), str(options.ranks))
        if options.broken:
            launcher = (sys.executable, "-c", "raise ImportError('no launcher here')")
        plan = LaunchPlan(
            command=(*launcher, *program),
            environment=plan.environment,
            ranks=plan.ranks,
            gpus=0,
        )
    with RunLock(options.folder):
        return supervise(
            plan,
            options.folder / "logs",
            save_timeout=options.save_timeout,
            grace=options.grace,
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
