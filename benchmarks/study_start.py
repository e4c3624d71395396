"""What a short run of a study takes: with imports of its own, and forked from a warm process.

A study of ``--runs`` runs of one rank that differ in their seed is carried out by the runner of
tools/mix.py, one run at a time on one thread, on generated data: two layers of width 64, 64
tokens of vocabulary, 32 samples of 64 tokens a step.  It is done both ways in turn, at two lengths:
the shorter one is nearly nothing but the start and the end, and their difference is the cost of a
step.  What the warm process takes to start is shared out among its runs.  That both give the
same losses to the last bit is asserted, no time is.

    python benchmarks/study_start.py
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.support.measure import Times, compared, machine, shown, spread, write
from megatron.data.writer import TokenWriter
from megatron.experiments.execute import execute
from megatron.experiments.starting import Starter, last_words
from megatron.experiments.study import Base, PlannedRun, Variant, plan_study
from megatron.launch.devices import Devices

VOCABULARY = 64
DOMAINS = {"narrow": 20, "middle": 40, "wide": 63}
WAYS = {"imports of its own": False, "forked": True}


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="study-start-", dir=options.directory) as name:
        folder = Path(name)
        make_data(folder)
        results = [_compare(folder, steps, options) for steps in options.steps]
    content = {
        "benchmark": "study_start",
        "command": "python benchmarks/study_start.py",
        "machine": machine("torch", "deepspeed"),
        "settings": {"turns": options.turns, "runs": options.runs},
        "results": results,
    }
    if options.write:
        print(f"wrote {write('study_start', content)}")


def _compare(folder: Path, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Carry out studies of so many steps a run, both ways in turn."""
    found = {way: Times() for way in WAYS}
    for turn in range(options.turns):
        lost = []
        for way in (list(WAYS), list(reversed(WAYS)))[turn % 2]:
            place = folder / f"{steps}-{turn}-{WAYS[way]}"
            runs = planned(folder, place, options.runs, steps)
            wall, processor = measure(runs, warm=WAYS[way])
            found[way].wall.append(wall)
            found[way].processor.append(processor)
            lost.append(losses(runs))
        assert all(lost[0])
        assert lost[0] == lost[1], "the two ways do not compute the same"
    cold, forked = (found[way] for way in WAYS)
    rows = {
        way: {"wall_seconds": spread(one.wall), "processor_seconds": spread(one.processor)}
        for way, one in found.items()
    }
    ratio = compared(cold, forked)
    print(
        f"{steps} steps: "
        + ", ".join(f"{way} {shown(row['processor_seconds'])} s a run" for way, row in rows.items())
        + f"; ratio {shown(ratio['processor'])}, by the clock {shown(ratio['wall'])}",
        flush=True,
    )
    return {"steps": steps, "ways": rows, "own_imports_over_forked": ratio}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=4, help="runs of a study")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50], help="the lengths")
    parser.add_argument("--turns", type=int, default=2, help="studies of either way and length")
    parser.add_argument("--directory", help="where the files are made (default: the system's)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


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


if __name__ == "__main__":
    main()
