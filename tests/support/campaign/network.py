"""R19: two nodes in network namespaces of this machine, and the link between them cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from support import runs
from support.campaign.kills import last_told
from support.campaign.row import Bench, SkippedRowError, Trial, attempt, must

STEPS = 4000
ADDRESSES = ("10.213.7.1", "10.213.7.2")
STALL = 15
PATIENCE = 600


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedRowError(f"no network namespaces here: ip {' '.join(words)}: {done.stderr}")


class Nodes:
    """Two hosts that know of each other through one link only."""

    def __init__(self, name: str) -> None:
        """Make the namespaces and the link."""
        self.names = (f"{name}a", f"{name}b")
        self.links = (f"{name}va", f"{name}vb")
        for host in self.names:
            _ip("netns", "add", host)
        first, second = self.names
        _ip(
            *("link", "add", self.links[0], "netns", first),
            *("type", "veth", "peer", "name", self.links[1], "netns", second),
        )
        for host, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", host, "link", "set", "lo", "up")
        self.connect()

    def connect(self) -> None:
        """Put the link up on both sides."""
        for host, link in zip(self.names, self.links, strict=True):
            _ip("-n", host, "link", "set", link, "up")

    def cut(self, side: int) -> None:
        """Take the link down on one side; the other sees no carrier, and no answer."""
        _ip("-n", self.names[side], "link", "set", self.links[side], "down")

    def start(self, node: int, file: Path) -> subprocess.Popen[bytes]:
        """Start ``deepy.py`` on a node, its output in a file beside the configuration."""
        with file.with_suffix(".out").open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *runs.command("train.py", file)],
                env=runs.environment(
                    GLOO_SOCKET_IFNAME=self.links[node], DS_ACCELERATOR="cpu", PYTHONUNBUFFERED="1"
                ),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def close(self) -> None:
        """Remove the namespaces, and the link with them."""
        for host in self.names:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


@contextmanager
def two_nodes(name: str) -> Iterator[Nodes]:
    """Make two nodes, and remove them."""
    if sys.platform != "linux" or os.getuid() != 0:
        raise SkippedRowError("network namespaces need Linux and root")
    nodes = None
    try:
        nodes = Nodes(name)
        yield nodes
    finally:
        if nodes is not None:
            nodes.close()
        else:
            for end in "ab":
                subprocess.run(
                    ["ip", "netns", "delete", name + end], capture_output=True, check=False
                )


def cut(bench: Bench, trials: int) -> Iterator[Trial]:
    """R19: the job ends with its own message, and the same commands go on."""
    data = bench.folder / "data"
    runs.make_data(data)
    for number in range(trials):
        name = f"nx{os.getpid() % 100000}{number % 10}"
        with two_nodes(name) as nodes:
            yield attempt(partial(_cut_once, bench, data, nodes, number))


def _files(folder: Path, data: Path, steps: int, **changes: Any) -> list[Path]:
    return [
        runs.write_config(
            folder / f"node{node}.yml",
            runs.config(
                data, folder / "run", launcher="torchrun", num_nodes=2, num_gpus=1,
                node_rank=node, master_addr=ADDRESSES[0], master_port=29541, train_iters=steps,
                eval_interval=10_000, log_interval=1, keep_last_n_checkpoints=2,
                stall_report=5, stall_timeout=STALL, **changes,
            ),
        )
        for node in (0, 1)
    ]  # fmt: skip


def _cut_once(bench: Bench, data: Path, nodes: Nodes, number: int) -> None:
    folder, chance = bench.fresh(f"cut{number}"), bench.chance(number)
    # Every third job saves after each step, so that the cut is likely to fall into a save.
    saving = {"save_interval": 1 if number % 3 == 2 else 5}
    files = _files(folder, data, STEPS, **saving)
    outputs = [file.with_suffix(".out") for file in files]
    jobs = [nodes.start(node, file) for node, file in enumerate(files)]
    try:
        _wait(lambda: last_told(outputs[0].read_text()) >= 12, jobs, outputs)
        time.sleep(chance.random())
        nodes.cut(number % 2)
        codes = [job.wait(timeout=PATIENCE) for job in jobs]
    finally:
        for job in jobs:
            _end(job)
    texts = [output.read_text() for output in outputs]
    must(all(code not in (0, -9) for code in codes), f"exit codes {codes}\n{texts}")
    for node, text in enumerate(texts):
        own = "nothing has moved for stall_timeout" in text or "error:" in text
        must(own, f"node {node} ended without a message of ours\n{text[-3000:]}")
    reached = last_told(texts[0])

    nodes.connect()
    last = reached + 20
    files = _files(folder, data, last, **saving)
    jobs = [nodes.start(node, file) for node, file in enumerate(files)]
    try:
        codes = [job.wait(timeout=PATIENCE) for job in jobs]
    finally:
        for job in jobs:
            _end(job)
    texts = [output.read_text() for output in outputs]
    must(codes == [0, 0], f"exit codes {codes}\n{texts[0][-2000:]}\n{texts[1][-2000:]}")
    must("loaded" in texts[0], f"did not resume\n{texts[0]}")
    steps = [record["step"] for record in runs.records(folder / "run", "mixture")]
    must(steps == list(range(1, last + 1)), "a step is missing or appears twice")


def _wait(condition: Any, jobs: list[Any], outputs: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        told = "\n".join(output.read_text()[-2000:] for output in outputs)
        must(all(job.poll() is None for job in jobs), f"ended by itself\n{told}")
        must(time.monotonic() < deadline, f"nothing happens\n{told}")
        time.sleep(0.1)


def _end(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is None:
        for pid in runs.family(job.pid):
            runs.with_suppressed_kill(pid)
        job.send_signal(signal.SIGKILL)
        job.wait()
