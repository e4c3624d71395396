"""Pretend to train: ``fake_run.py WHAT FOLDER NAME`` leaves the files of a run of twelve steps.

WHAT is ``good``; ``bad`` (fails); ``once`` (fails when first started); ``short`` (ends with 0
before its last step); ``slow`` (saves and stops when told to); ``NAME:bad`` (fails for that name).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STEPS = 12


def write(folder: Path, steps: int) -> None:
    mixture, metrics = [], []
    valid = {"walk": 3.0, "drift": 4.0, "noise": 5.0}
    metrics.append({"step": 0, "valid_loss": valid})
    for step in range(1, steps + 1):
        weights = {"walk": 0.5 + step / 100, "drift": 0.5 - step / 100, "noise": 0.0}
        tokens = {"walk": 64, "drift": 64, "noise": 0}
        samples = {"walk": 4, "drift": 4, "noise": 0}
        record = {"step": step, "probability": weights, "tokens": tokens, "samples": samples}
        mixture.append({**record, "extra_tokens": {"validation": 10}})
        metrics.append({"step": step, "loss": 4.0, "tokens_per_second": 1280.0})
    halved = {name: loss / 2 for name, loss in valid.items()}
    metrics.append({"step": steps, "valid_loss": halved})
    for name, lines in (("mixture", mixture), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main(what: str, folder: Path, name: str) -> int:
    with (folder / "starts").open("a", encoding="utf-8") as file:
        file.write("x")
    first = (folder / "starts").stat().st_size == 1
    if ":" in what:
        whom, _, kind = what.partition(":")
        what = kind if whom == name else "good"
    if what == "slow":
        told: list[int] = []

        def note(number: int, _frame: FrameType | None) -> None:
            told.append(number)

        signal.signal(signal.SIGTERM, note)
        (folder / "ready").touch()
        while not told:
            time.sleep(0.02)
        time.sleep(0.3)  # saving takes longer than a shell takes to end
        write(folder, 5)
        return 143
    if what == "bad" or (what == "once" and first):
        print("the disk was eaten by a dog", flush=True)
        return 3
    write(folder, 7 if what == "short" else STEPS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
