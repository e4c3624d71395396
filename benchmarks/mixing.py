"""What mixing online costs: every method's step against the step of a static mixture.

One model, one process, one thread.  Every method has a loop of its own (controller, planner,
reader, ledger, recorder), and all drive the same engine, a step each in turn.  Two figures come of
it: the ratio of step times, which the machine's noise blurs, and what the loop's thread does
outside the engine, which it hardly does; the median difference of the latter, with the part that
a step has in what is done now and then, is what a method costs, as a share of a static step and of
one of 100 ms.  ``static`` runs twice: the ratio of the two is the noise.

Methods that measure something beside the training losses (held-out losses, gradients, a
reference) pay for it in passes through the model, which docs/mixbench.md charges them for; here
their controllers are timed by themselves, in a simulated world.

    python benchmarks/mixing.py                      # K = 5, 22 and 1,000
    python benchmarks/mixing.py --domains 22 --turns 20
    DS_ACCELERATOR=cuda python benchmarks/mixing.py --no-write      # on a GPU
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from benchmarks.support.measure import compared, machine, race, rounded, shown, spread, write

ONLINE: dict[str, dict[str, Any]] = {
    "static again": {"method": "static"},
    "odm": {"method": "odm", "draw": "multinomial"},
    "exp3": {"method": "exp3", "draw": "multinomial"},
    "ema": {"method": "ema"},
    "smoothed_mean": {"method": "smoothed_mean"},
    "smoothed_mean_exp": {"method": "smoothed_mean_exp"},
    "ado": {"method": "ado", "first_fit": 8, "fit_every": 1000, "subsample": 1},
    "auto": {"method": "auto"},
}
"""Methods that live on training losses; ``ado`` fits early here, so that it does at all."""
NOW_AND_THEN = {"ado": 1_000, "auto": 10_000}
"""Steps between what some do now and then: ADO's fits by default, auto's one count in a run."""
FITTED = (20, 200, 1_000)
"""Points that ADO's laws are fitted to: early in a run, later, and after 10,000 steps."""
ALONE = (*ONLINE, "aioli", "skillit", "naive_validation", "validation_gap", "doge", "doremi")
MODEL = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 128,
    "vocab_size": 4096,
    "rotary_pct": 0.25,
}
ROWS = 32


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    results = []
    for domains in options.domains:
        with tempfile.TemporaryDirectory() as folder:
            results.append(_trained(Path(folder), domains, options))
            results[-1]["controllers"] = _alone(domains)
            results[-1]["fit_ms_a_domain"] = {str(n): _fits(domains, n) for n in FITTED}
        _print(results[-1])
        content = {
            "benchmark": "mixing",
            "command": "python benchmarks/mixing.py",
            "machine": machine("torch", "deepspeed", "numpy"),
            "settings": {"model": MODEL, "rows": ROWS, "turns": options.turns},
            "results": results,
        }
        if options.write:
            print(f"wrote {write('mixing', content)}", flush=True)


class _Contestant:
    """A method's loop around the shared engine."""

    def __init__(self, parts: Any, observer: Any, loop: Any) -> None:
        self.parts, self.observer, self.loop = parts, observer, loop
        self.done = 0
        self.beside: list[float] = []

    def step(self) -> None:
        engine = self.parts.engine
        engine.module.loss_fn.observe = self.observer
        inside = [0.0]
        train = type(engine).train_step

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return train(engine, *arguments, **named)
            finally:
                inside[0] += time.thread_time() - began

        engine.train_step = timed
        began = time.thread_time()
        self.loop.run(start=self.done, last=self.done + 1)
        self.beside.append(time.thread_time() - began - inside[0])
        self.done += 1


def _trained(folder: Path, domains: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import megatron.mixing  # noqa: F401  (registers the methods)
    from megatron.config import load_config
    from megatron.engine.runtime import start_runtime
    from megatron.training import build as building
    from megatron.training.check import build_controller, preflight

    torch.set_num_threads(1)
    _write_data(folder, domains)
    runtime = start_runtime(deterministic=True)
    on_gpu = runtime.device.type == "cuda"
    checked = preflight(
        load_config([_write(folder, domains, "static")]), world_size=1, gpus=int(on_gpu)
    )
    build_engine, shared, observers = building.build_engine, [], []

    def once(config: Any, topology: Any, batch: Any, observer: Any) -> Any:
        observers.append(observer)
        if not shared:
            shared.append(build_engine(config, topology, batch, observer))
        return shared[0]

    contestants: dict[str, _Contestant] = {}
    with mock.patch.object(building, "build_engine", once):
        for name in ("static", *ONLINE):
            file = _write(folder, domains, name)
            config = load_config([file])
            config = config.model_copy(update={"model": checked.config.model})
            mixer = build_controller(
                config, checked.domains, checked.weights, micro=ROWS, total=ROWS
            )
            parts = building.build(config, runtime, checked.domains, mixer)
            parts.sinks.start(None, {})
            contestants[name] = _Contestant(parts, observers[-1], _loop(parts, runtime))
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        times = race(
            {name: one.step for name, one in contestants.items()},
            turns=options.turns,
            warmup=options.warmup,
            wait=torch.cuda.synchronize if on_gpu else lambda: None,
        )
        syncs = {name: _syncs(one) for name, one in contestants.items()}
    static = contestants["static"].beside[options.warmup :]
    step = spread(times["static"].wall if on_gpu else times["static"].processor)["median"]
    rows = {}
    for name in ONLINE:
        beside = contestants[name].beside[options.warmup :]
        extra = [a - b for a, b in zip(beside, static, strict=True)]
        steady = spread(extra)["median"]
        events = [value for value in contestants[name].beside if value > 10 * steady + 20e-3]
        event = max(events, default=0.0) if name in NOW_AND_THEN else 0.0
        rows[name] = {
            "step": compared(times[name], times["static"]),
            "host_ms": spread([1e3 * value for value in beside]),
            "extra_ms": spread([1e3 * value for value in extra]),
            "now_and_then_ms": rounded(1e3 * event),
            "now_and_then_every": NOW_AND_THEN.get(name),
            "cost": rounded((steady + event / NOW_AND_THEN.get(name, 1)) / step),
            "cost_of_100_ms": rounded((steady + event / NOW_AND_THEN.get(name, 1)) / 0.1),
            "syncs_more": syncs[name] - syncs["static"],
        }
    result = {
        "domains": domains,
        "step_ms": rounded(1e3 * step),
        "static_host_ms": spread([1e3 * value for value in static]),
        "methods": rows,
    }
    for one in contestants.values():
        one.parts.sinks.close()
        one.parts.close()
    checked.domains.close()
    shared[0]._engine.destroy()
    return result


def _syncs(contestant: _Contestant) -> int:
    """Return how often two further steps would wait for a device."""
    sys.path.insert(0, os.path.join(sys.path[0], "tests"))
    try:
        from support.host_syncs import host_syncs
    finally:
        sys.path.pop(0)
    with host_syncs() as counted:
        contestant.step()
        contestant.step()
    return counted.total


def _loop(parts: Any, runtime: Any) -> Any:
    from megatron.training.loop import Loop

    return Loop(
        engine=parts.engine,
        planner=parts.planner,
        reader=parts.reader,
        foresight=parts.foresight,
        ledger=parts.ledger,
        guard=parts.guard,
        recorder=parts.recorder,
        learning_rate=parts.learning_rate,
        stop_requested=lambda: False,
        exits_at=lambda step: False,
        after_step=lambda step, ending: None,
        device=runtime.device,
        overhead=parts.overhead,
    )


def _write_data(folder: Path, domains: int) -> None:
    from megatron.data.writer import TokenWriter

    random = np.random.default_rng(0)
    for number in range(domains):
        with TokenWriter(folder / f"d{number}", np.uint16) as writer:
            for _ in range(4):
                tokens = random.integers(0, 50 + 2 * number, 5_000)
                writer.add(tokens.astype(np.uint16))


def _write(folder: Path, domains: int, name: str) -> str:
    content = {
        **MODEL,
        "num_gpus": 1,
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": ROWS,
        "train_iters": 1_000_000,
        "eval_interval": 1_000_000,
        "log_interval": 10,
        "split": "90,5,5",
        "run_dir": str(folder / "runs" / name.replace(" ", "-")),
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "mixing": ONLINE.get(name, {"method": "static"}),
        "domains": {f"d{n}": {"train": str(folder / f"d{n}")} for n in range(domains)},
    }
    file = folder / f"{name.replace(' ', '-')}.yml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def _alone(domains: int, steps: int = 60) -> dict[str, dict[str, float]]:
    """Return the microseconds of a controller's step (decide, learn), by method."""
    sys.path.insert(0, os.path.join(sys.path[0], "tests"))
    try:
        from support.mixing import build_any, go
    finally:
        sys.path.pop(0)
    from megatron.mixing.base import Observation

    names = [f"d{n}" for n in range(domains)]
    random = np.random.default_rng(0)
    taken: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(ONLINE.get(name, {"method": name})["method"] for name in ALONE):
        mixer = build_any(name, domains=names)
        each = []
        for step in range(1, steps + 1):
            counts = random.integers(1, 9, domains).astype(float)
            observation = Observation(
                step=step,
                loss_sum=counts * (3 + random.random(domains)),
                token_count=counts,
                loss_square_sum=counts * 10,
                sample_count=counts,
                sampling_weights=np.full(domains, 1 / domains),
                learning_rate=1e-3,
            )
            began = time.thread_time()
            mixer.decide(step)
            go(mixer, observation)
            each.append(1e6 * (time.thread_time() - began))
        taken[name] = {**spread(each), "mean": rounded(sum(each) / len(each))}
    return taken


def _fits(domains: int, points: int) -> float:
    """Return the milliseconds of a domain's part in fitting ADO's laws to so many points each."""
    from megatron.mixing.power_law import fit_power_laws

    random = np.random.default_rng(0)
    count = min(domains, 24)  # more are fitted in as many parts
    n = np.repeat(ROWS * 10.0 * np.arange(1, points + 1)[:, None], count, axis=1)
    noise = random.normal(0, 0.003, n.shape)  # about what the filter leaves
    loss = (random.uniform(0.5, 2.5, count) + 9 * n ** -random.uniform(0.1, 0.5, count)) * np.exp(
        noise
    )
    times = []
    for _ in range(3):
        began = time.thread_time()
        fit_power_laws(n, loss)
        times.append(1e3 * (time.thread_time() - began) / count)
    return rounded(sorted(times)[1])


def _print(result: dict[str, Any]) -> None:
    print(
        f"\nK = {result['domains']:,}: a static step takes {result['step_ms']:.0f} ms of the "
        f"processor, {result['static_host_ms']['median']:.2f} ms of it outside the engine"
    )
    for name, row in result["methods"].items():
        print(
            f"{name:>18}: step {shown(row['step']['processor'], 3)} × static, by the clock "
            f"{shown(row['step']['wall'], 3)}; {row['extra_ms']['median']:+.2f} ms a step = "
            f"{row['cost']:+.2%} ({row['cost_of_100_ms']:+.2%} of 100 ms); "
            f"{row['syncs_more']:+d} syncs"
            + (
                f"; {row['now_and_then_ms']:.0f} ms every {row['now_and_then_every']:,} steps"
                if row["now_and_then_every"]
                else ""
            )
        )
    alone = ", ".join(f"{name} {row['mean']:.0f}" for name, row in result["controllers"].items())
    print(f"    controllers alone, µs a step: {alone}")
    fits = ", ".join(f"{n} points {ms:.1f}" for n, ms in result["fit_ms_a_domain"].items())
    print(f"    ADO's fits, ms a domain: {fits}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--domains", type=int, nargs="+", default=[5, 22, 1000])
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
