"""The agent of one node: ``python -m megatron.launch.node … SCRIPT ARGUMENTS…``.

pdsh, mpirun or srun starts one on every host.  It finds out which of the hosts this is,
starts the host's ranks and supervises them as ``deepy.py`` does on a single node.  With
``--job`` it reports to the parent of all nodes (:mod:`megatron.launch.cluster`) through its
own output and leaves the last word to it; without, it works and speaks for itself.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, NeomixError, run_command
from megatron.launch.carry import environment_files, read_environment_files
from megatron.launch.command import plan_node
from megatron.launch.devices import detect_devices
from megatron.launch.hosts import is_local, parse_world
from megatron.launch.outcome import RankEnd
from megatron.launch.process import die_with_parent
from megatron.launch.reports import format_report, pack_ends
from megatron.launch.request import visible_slots
from megatron.launch.slurm import expand_nodes
from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED
from megatron.launch.supervise import Agent, supervise
from megatron.launch.tell import address

# How long an agent whose ranks have failed waits for the parent, which hears all nodes
# before it ends them: leaving with an error at once would make srun and mpirun kill others
# that are about to say what really happened.
PATIENCE = 60.0


def main(arguments: Sequence[str]) -> int:
    """Run this node's ranks and return the exit code."""
    options = _parse(arguments)
    if options.watch_stdin:
        threading.Thread(target=_die_with_stdin, daemon=True).start()
    else:
        die_with_parent()
    reporter = _Reporter(options.job)
    if not options.job:
        return run_command(lambda: _run(options, reporter))
    try:
        return _run(options, reporter)
    except NeomixError as error:
        reporter.send({"ended": error.exit_code, "words": [f"error: {error}"], "ends": []})
        return reporter.leave(error.exit_code)


class _Reporter:
    """What this node tells the parent; nothing, if there is none."""

    def __init__(self, job: str | None) -> None:
        self.job = job
        self.node = 0
        self._sent = 0
        self._words: list[str] = []
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        if self.job is None:
            return
        with self._lock:
            self._sent += 1
            lines = format_report(self.node, self._sent, message)
            for line in lines.splitlines(keepends=True):
                os.write(1, line)

    def say(self, message: str) -> None:
        self._words.append(message)

    def concluded(self, ends: list[RankEnd], code: int) -> None:
        self.send({"ended": code, "words": self._words, "ends": pack_ends(ends)})

    def leave(self, code: int) -> int:
        """Return the code to end with once reported; failing is for the parent to end."""
        if code in (0, EXIT_SAVED, EXIT_INTERRUPTED):
            return 0
        time.sleep(PATIENCE)
        return code


def _run(options: argparse.Namespace, reporter: _Reporter) -> int:
    world = parse_world(options.world)
    node = find_node(options.node, list(world), os.environ)
    reporter.node = node
    for name, value in read_environment_files(environment_files(Path.home(), Path.cwd())).items():
        os.environ.setdefault(name, value)
    host = list(world)[node]
    reporter.send({"hello": host, "name": socket.gethostname(), "pid": os.getpid()})
    devices = detect_devices(os.environ)
    world[host] = visible_slots(world[host], devices, host)
    master = options.master_addr
    if master == "slurm":
        listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        master = expand_nodes(listed)[0]
    plan = plan_node(
        world,
        node,
        [options.script, *options.arguments],
        master=(master, options.master_port),
        environ=os.environ,
        devices=devices,
    )
    agent = Agent(
        address=address(options.job or f"{os.getpid()}-{os.urandom(4).hex()}", node),
        concluded=reporter.concluded,
        stopping=lambda: reporter.send({"stopping": True}),
    )
    code = supervise(
        plan,
        Path(options.log_dir),
        save_timeout=options.save_timeout,
        say=reporter.say if options.job else None,
        agent=agent,
    )
    return reporter.leave(code) if options.job else code


def find_node(spec: str, hosts: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return which of ``hosts`` this is.

    Args:
        spec: the number itself (pdsh); ``host:VARIABLE``: the host whose name or address is
            this machine's, and the one that VARIABLE numbers where that is not one alone;
            ``only:VARIABLE``: the one that VARIABLE numbers.
        hosts: names, in the order of the ranks.
        environ: the environment.

    Raises:
        ConfigError: nothing tells.
    """
    if spec.isdigit() and int(spec) < len(hosts):
        return int(spec)
    kind, _, variable = spec.partition(":")
    number = environ.get(variable, "")
    numbered = int(number) if number.isdigit() and int(number) < len(hosts) else None
    if kind == "only" and numbered is not None:
        return numbered
    if kind == "host":
        if numbered is not None and is_local(hosts[numbered]):
            return numbered
        own = [n for n, host in enumerate(hosts) if is_local(host)]
        if len(own) == 1:
            return own[0]
        if numbered is not None:
            return numbered
    raise ConfigError(
        f"host {socket.gethostname()} cannot tell which of {', '.join(hosts)} it is: none of the "
        f"names is its own, and {variable or 'the number'} is {number or spec!r}; write the names "
        "in the hostfile as 'hostname' prints them"
    )


def _die_with_stdin() -> None:
    """End at once, and with it everything below, when the other side of the shell is gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), 9)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron.launch.node", allow_abbrev=False)
    parser.add_argument("--world", required=True, help="HOST:SLOT,SLOT@HOST:SLOT…")
    parser.add_argument("--node", required=True, help="number of this node, or where it stands")
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--master-port", required=True, type=int)
    parser.add_argument("--log-dir", required=True)
    parser.add_argument("--save-timeout", required=True, type=float)
    parser.add_argument("--job", help="report to the parent of all nodes under this name")
    parser.add_argument("--watch-stdin", action="store_true", help="end when stdin is closed")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
