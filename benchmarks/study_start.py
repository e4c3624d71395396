"""What a short run of a study takes: with imports of its own, and forked from a warm process.

    python benchmarks/study_start.py [--runs 4] [--output benchmarks/results/study_start.md]

A study of ``--runs`` runs of one rank that differ in their seed is carried out by the runner of
tools/mix.py, one run at a time on one thread, on generated data: two layers of width 64, 64
tokens of vocabulary, 32 samples of 64 tokens a step.  It is done both ways in turn, ``--repeat``
times, at two lengths: the shorter one is nearly nothing but the start and the end, and their
difference is the cost of a step.  Printed: seconds a run, and the ratio of the two ways.  That
both give the same losses to the last bit is asserted, no time is.

All files are made in a temporary folder and removed at the end.
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import datetime
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from megatron.data.writer import TokenWriter
from megatron.experiments.execute import execute
from megatron.experiments.starting import Starter, last_words
from megatron.experiments.study import Base, PlannedRun, Variant, plan_study
from megatron.launch.devices import Devices

VOCABULARY = 64
DOMAINS = {"narrow": 20, "middle": 40, "wide": 63}
WAYS = {"imports of its own": False, "forked": True}


def main() -> int:
    """Measure, print, and write the result if asked to."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="study-start-", dir=options.directory) as folder:
        make_data(Path(folder))
        lines = table(Path(folder), options)
    report = "\n".join(header() + lines) + "\n"
    print(report)
    if options.output:
        Path(options.output).write_text(report, encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=4, help="runs of a study")
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 400], help="the two lengths")
    parser.add_argument("--repeat", type=int, default=3, help="studies of either way and length")
    parser.add_argument("--directory", help="where the files are made (default: the system's)")
    parser.add_argument("--output", help="write the result here too")
    return parser.parse_args()


def header() -> list[str]:
    """Say when, where and how."""
    command = " ".join(["python", "benchmarks/study_start.py", *sys.argv[1:]])
    return [
        "# Starting the runs of a study",
        "",
        f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, Python "
        f"{platform.python_version()}, torch {version('torch')}, DeepSpeed "
        f"{version('deepspeed')}; `{command}`",
        "",
    ]


def make_data(folder: Path) -> None:
    """Write domains of random walks over a part of the vocabulary."""
    random = np.random.default_rng(0)
    for name, states in DOMAINS.items():
        for part, documents in (("train", 3000), ("valid", 300)):
            with TokenWriter(folder / f"{name}_{part}", np.uint16) as writer:
                for length in random.integers(50, 300, documents):
                    steps = np.cumsum(random.integers(0, 3, length))
                    tokens = (random.integers(0, states) + steps) % states
                    writer.add(np.append(tokens, VOCABULARY - 1).astype(np.uint16))


def planned(folder: Path, runs_dir: Path, runs: int, steps: int) -> Sequence[PlannedRun]:
    """Plan a study of runs of so many steps."""
    settings = {
        "num_gpus": 1,
        "run_dir": str(folder / "elsewhere"),
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "domains": {
            name: {part: str(folder / f"{name}_{part}") for part in ("train", "valid")}
            for name in DOMAINS
        },
        "mixing": {"method": "odm"},
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "train_iters": steps,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95]}},
        "log_interval": max(1, steps // 10),
        "eval_interval": steps,
        "eval_iters": 1,
        "save_interval": steps,
    }
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    variants = [Variant(name=f"seed-{n}", overrides=(f"seed={n}",)) for n in range(runs)]
    return plan_study("study", Base(files=(str(file),)), variants, runs_dir).distinct


def measure(runs: Sequence[PlannedRun], *, warm: bool) -> tuple[float, float]:
    """Carry a study out; return its seconds, and those of its processes at work, per run."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    starter = Starter(
        jobs=1,
        devices=Devices(cuda=(), cores=os.cpu_count() or 1),
        environ=environ,
        warm=warm,
    )
    start, worked = time.perf_counter(), children_seconds()
    outcome = execute(runs, starter, retries=0, say=lambda _: None)
    seconds, work = time.perf_counter() - start, children_seconds() - worked
    if outcome.exit_code:
        raise SystemExit("\n".join(["a run failed:", *last_words(runs[0])]))
    return seconds / len(runs), work / len(runs)


def children_seconds() -> float:
    """Return the processor time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def losses(runs: Sequence[PlannedRun]) -> list[list[float]]:
    """Return what each run lost at the steps that it has logged."""
    found = []
    for run in runs:
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found.append([record["loss"] for record in records if "loss" in record])
    return found


def table(folder: Path, options: argparse.Namespace) -> list[str]:
    """Measure both ways in turn, at both lengths."""
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for again in range(options.repeat):
        for steps in options.steps:
            found = []
            for way, warm in WAYS.items():
                place = folder / f"{steps}-{again}-{warm}"
                runs = planned(folder, place, options.runs, steps)
                seconds.setdefault((way, steps), []).append(measure(runs, warm=warm))
                found.append(losses(runs))
            assert all(found[0])
            assert found[0] == found[1], "the two ways do not compute the same"
    return rows(seconds, options)


def rows(
    seconds: dict[tuple[str, int], list[tuple[float, float]]], options: argparse.Namespace
) -> list[str]:
    """Format medians, and the ratio of what was measured next to each other."""
    short, long = options.steps
    lines = [
        f"Seconds a run, medians of {options.repeat} studies of {options.runs} runs of 104,192 "
        "parameters, one at a time on one thread; what the warm process takes to start is shared "
        f"out among its {options.runs} runs. The losses of both ways were the same.",
        "",
        "Processor time is what other load on the machine disturbs least.",
        "",
        f"| way | {short} steps | {long} steps | processor time: {short} steps | {long} steps "
        "| a further step |",
        "|---|---|---|---|---|---|",
    ]
    kinds = [(kind, steps) for kind in (0, 1) for steps in (short, long)]
    for way in WAYS:
        cells = [statistics.median(one[kind] for one in seconds[way, n]) for kind, n in kinds]
        step = (cells[3] - cells[2]) / (long - short) * 1e3
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {way} | {shown} | {step:.1f} ms |")
    cold, forked = WAYS
    ratios = []
    for kind, n in kinds:
        pairs = zip(seconds[cold, n], seconds[forked, n], strict=True)
        ratios.append(statistics.median(one[kind] / other[kind] for one, other in pairs))
    return [*lines, "| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |"]


if __name__ == "__main__":
    sys.exit(main())
