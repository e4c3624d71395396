"""Real runs on tiny data: making them, starting them, and comparing what they left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron.data.reader import TokenReader
from megatron.data.sidecar import FileStamp, Sidecar, write_sidecar
from megatron.data.writer import TokenWriter
from megatron.monitor.record import TIME_FIELDS

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
DOMAINS = {"walk": 20, "drift": 50, "noise": 100}
EOD = 119


def make_data(folder: Path, documents: int = 200) -> None:
    """Write three domains of short random documents that end with an end-of-document token."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, states in DOMAINS.items():
        with TokenWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                length = int(random.integers(20, 200))
                steps = np.cumsum(random.integers(0, 3, length))
                tokens = (random.integers(0, states) + steps) % states
                writer.add(np.append(tokens, EOD).astype(np.uint16))


def add_sidecars(folder: Path) -> None:
    """Let the data say which token ends a document."""
    for name in DOMAINS:
        reader = TokenReader(folder / name)
        stamps = {
            kind: FileStamp(size=(folder / f"{name}.{kind}").stat().st_size, sha256="0" * 64)
            for kind in ("bin", "idx")
        }
        write_sidecar(
            folder / name,
            Sidecar(
                documents=reader.num_documents,
                tokens=reader.num_tokens,
                bytes=4 * reader.num_tokens,
                dtype="uint16",
                vocab_size=120,
                append_eod=True,
                eod_id=EOD,
                bin=stamps["bin"],
                idx=stamps["idx"],
            ),
        )


def config(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a run of a few seconds on two CPU ranks."""
    base: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 16,
        "vocab_size": 120,
        "rotary_pct": 0.5,
        "num_gpus": 2,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "train_iters": 24,
        "eval_interval": 5,
        "eval_iters": 2,
        "save_interval": 3,
        "log_interval": 2,
        "split": "80,10,10",
        "audit_samples": True,
        "run_dir": str(run_dir),
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "betas": [0.9, 0.95]}},
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "domains": {name: {"train": str(data / name)} for name in DOMAINS},
        "mixing": {"method": "odm", "draw": "multinomial"},
    }
    return {**base, **changes}


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of ``deepy.py`` with these arguments."""
    return [sys.executable, str(ROOT / "deepy.py"), *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment for a run on the CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run(*arguments: str | Path, timeout: float = 240, **env: str) -> Done:
    """Run ``deepy.py`` to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tool(name: str, *arguments: str) -> Done:
    """Run one of ``tools/`` to its end."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def train(file: Path, *arguments: str, timeout: float = 240) -> Done:
    """Train to the end, and fail with what was printed if that does not succeed."""
    done = run("train.py", file, *arguments, timeout=timeout)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class LiveRun:
    """A run in the background that can be watched and killed."""

    def __init__(self, file: Path, *arguments: str) -> None:
        self.run_dir = Path(yaml.safe_load(file.read_text(encoding="utf-8"))["run_dir"])
        self.output = file.with_suffix(".out").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command("train.py", file, *arguments),
            env=environment(),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Wait until the console has told of ``step`` (the ledger is written in blocks)."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            told = [int(number) for number in re.findall(r"step +(\d+)/", self.text())]
            if self.process.poll() is not None or max(told, default=0) >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached in {timeout} s\n{self.text()}")

    def text(self) -> str:
        """Return what was printed so far."""
        self.output.seek(0)
        return self.output.read()

    def family(self) -> dict[int, str]:
        """Return the command lines of all living processes that this run started, by pid."""
        return family(self.process.pid)

    def end(self) -> int:
        """Make sure that nothing is left; return the exit code."""
        for pid in self.family():
            with_suppressed_kill(pid)
        return self.process.wait(timeout=30)


def with_suppressed_kill(pid: int) -> None:
    """Kill a process that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def family(root: int) -> dict[int, str]:
    """Return pid and command line of ``root`` and all its living descendants."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] in "ZX":
                continue
            lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parents[int(entry.name)] = int(fields[1])
        except OSError:
            continue
    found = {root} & lines.keys()
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return {pid: lines[pid] for pid in found}
        found |= more


def alive(pids: Sequence[int]) -> list[int]:
    """Return which processes still run (zombies do not)."""
    living = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            living.append(pid)
    return living


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return the objects of one of the run's files, without the fields of time."""
    path = run_dir / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS}
        for line in lines
    ]


def steps_done(run_dir: Path) -> int:
    """Return the number of whole lines in the ledger."""
    try:
        return (run_dir / "mixture.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def weights_hash(run_dir: Path, step: int) -> dict[str, str]:
    """Return a hash of each of DeepSpeed's files in a checkpoint: every tensor and number in it.

    Weights, optimizer, loss scale and counters, as all ranks wrote them.
    """
    folder = run_dir / "checkpoints" / f"global_step{step}"
    files = sorted(folder.glob("*.pt"))
    assert files, f"{folder} holds no files"
    return {file.name: _hash_file(file) for file in files}


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    for place, value in _leaves(torch.load(file, map_location="cpu", weights_only=False), ""):
        digest.update(f"{place} {getattr(value, 'dtype', type(value))}".encode())
        if torch.is_tensor(value):
            digest.update(f"{tuple(value.shape)}".encode())
            value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield all tensors and numbers within ``value``, each with its place."""
    if torch.is_tensor(value) or isinstance(value, (bool, int, float)):
        yield place, value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}/{index}")
    elif hasattr(value, "__dict__"):
        yield from _leaves(vars(value), place)


def assert_same_run(one: Path, other: Path, last: int) -> None:
    """Check that two runs left the same ledger, samples, metrics and weights, bit for bit."""
    for name in ("mixture", "samples", "metrics"):
        first, second = records(one, name), records(other, name)
        assert first == second, f"{name}.jsonl differs"
    steps = [record["step"] for record in records(other, "mixture")]
    assert steps == list(range(1, last + 1)), "a step is missing or appears twice"
    assert weights_hash(one, last) == weights_hash(other, last)
