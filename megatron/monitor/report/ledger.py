"""One pass over ``mixture.jsonl``: sums by domain, and a bounded number of points.

A run of a hundred thousand steps has more points than a screen has pixels.  The
steps are divided into equal bins; a bin's loss is its tokens' mean, its share is
its samples' share, so nothing is dropped, only averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.monitor.record import FloatArray, IntArray

BLOCK = 512
VECTORS = ("probability", "domain_loss", "tokens", "samples", "epochs")


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the ledger says, summed.

    Arrays ``[K]`` follow ``domains``; arrays ``[N]`` the N bins; ``[T]`` the T steps.

    Attributes:
        domains: names, in the order of their first appearance.
        steps: the steps recorded, ``[T]``.
        step_tokens: tokens of each step, ``[T]``.
        step_loss: token-weighted mean loss of each step, ``[T]``, NaN if nothing was finite.
        edges: last step of each bin, ``[N]``.
        width: steps that a bin spans (the last may be shorter).
        probability: mean probability by bin and domain, ``[N, K]``.
        controller: the same of a controller in shadow, or ``None``.
        weighed: mean share of each domain in the training loss, ``[N, K]``, of a method that
            weighs losses, or ``None``.
        share: realised share of the samples, ``[N, K]``.
        loss: token-weighted mean loss, ``[N, K]``, NaN where absent.
        epochs: epochs after the bin, ``[N, K]``.
        tokens: tokens of the whole run, ``[K]``.
        samples: samples of the whole run, ``[K]``.
        asked: sample-weighted mean of the probabilities, ``[K]``.
        first: probabilities of the first recorded step that is no probe, ``[K]``.
        last: probabilities of the last, ``[K]``.
        moved: largest |p - first| over the run, ``[K]``.
        skipped: steps whose update was dropped.
        extra_tokens: tokens spent on mixing over the whole run, by kind.
        notes: what a reader should know about the file.
    """

    domains: tuple[str, ...]
    steps: IntArray
    step_tokens: FloatArray
    step_loss: FloatArray
    edges: IntArray
    width: int
    probability: FloatArray
    controller: FloatArray | None
    weighed: FloatArray | None
    share: FloatArray
    loss: FloatArray
    epochs: FloatArray
    tokens: FloatArray
    samples: FloatArray
    asked: FloatArray
    first: FloatArray
    last: FloatArray
    moved: FloatArray
    skipped: int
    extra_tokens: Mapping[str, float]
    notes: tuple[str, ...]

    def tokens_after(self, step: int) -> float:
        """Return the tokens trained on up to and including ``step``."""
        return float(self.step_tokens[: np.searchsorted(self.steps, step, side="right")].sum())


def bin_limit(domains: int) -> int:
    """Return how many points a curve may have when there are ``domains`` of them."""
    return min(400, max(60, 16000 // max(1, domains)))


def bin_width(steps: int, limit: int) -> int:
    """Return the steps per bin: 1, 2 or 5 times a power of ten, so that axes read well."""
    width = 1
    while steps > width * limit:
        lead = int(str(width)[0])
        width = width * 5 // 2 if lead == 2 else width * 2
    return width


def read_ledger(records: Iterable[dict[str, Any]], *, first_step: int, last_step: int) -> Ledger:
    """Sum up ``records`` of the steps from ``first_step`` to ``last_step``."""
    summing: _Sums | None = None
    for record in records:
        if not all(isinstance(record.get(name), dict) for name in VECTORS):
            continue
        if summing is None:
            summing = _Sums(tuple(record["probability"]), first_step, last_step)
        summing.take(record)
    if summing is None:
        summing = _Sums((), first_step, last_step)
    return summing.finish()


class _Sums:
    """The running sums of :func:`read_ledger`."""

    def __init__(self, domains: tuple[str, ...], first_step: int, last_step: int) -> None:
        self.domains = domains
        self.start = first_step
        self.width = bin_width(last_step - first_step + 1, bin_limit(len(domains)))
        self.count = (last_step - first_step) // self.width + 1
        self.last_step = last_step
        self.block: list[dict[str, Any]] = []
        self.previous: int | None = None
        self.repeated = 0
        self.missing = 0
        self.skipped = 0
        self.shadow = False
        self.weighs = False
        self.extra_tokens: dict[str, float] = {}
        self.steps: list[IntArray] = []
        self.step_tokens: list[FloatArray] = []
        self.step_loss: list[FloatArray] = []
        self.bin_steps = np.zeros(self.count)
        names = (
            "probability",
            "controller",
            "weighed",
            "samples",
            "tokens",
            "loss_sum",
            "loss_tokens",
        )
        shape = (self.count, len(domains))
        self.sums = {name: np.zeros(shape) for name in names}
        self.epochs = np.full(shape, np.nan)
        self.asked = np.zeros(len(domains))
        self.first: FloatArray | None = None
        self.last = np.zeros(len(domains))
        self.moved = np.zeros(len(domains))

    def take(self, record: dict[str, Any]) -> None:
        """Queue a record; a block of them is summed at once."""
        step = record["step"]
        if step > self.last_step:
            return  # written after the file's end was looked up
        if self.previous is not None and step <= self.previous:
            self.repeated += 1
            return
        if self.previous is not None:
            self.missing += step - self.previous - 1
        self.previous = step
        self.skipped += bool(record.get("skipped"))
        for kind, tokens in (record.get("extra_tokens") or {}).items():
            self.extra_tokens[kind] = self.extra_tokens.get(kind, 0.0) + tokens
        if tuple(record["probability"]) != self.domains:
            self._flush()
            self._widen(record["probability"])
        self.block.append(record)
        if len(self.block) >= BLOCK:
            self._flush()

    def _widen(self, names: Iterable[str]) -> None:
        """Make room for domains that were not there before."""
        new = tuple(name for name in names if name not in self.domains)
        self.domains += new
        more = ((0, 0), (0, len(new)))
        self.sums = {name: np.pad(array, more) for name, array in self.sums.items()}
        self.epochs = np.pad(self.epochs, more, constant_values=np.nan)
        self.asked, self.last, self.moved = (
            np.pad(array, more[1]) for array in (self.asked, self.last, self.moved)
        )
        if self.first is not None:
            self.first = np.pad(self.first, more[1])

    def _matrix(self, name: str) -> FloatArray:
        """Return a vector of every record of the block, ``[n, K]``, NaN for null or absent."""
        if all(tuple(record[name]) == self.domains for record in self.block):
            rows = [list(record[name].values()) for record in self.block]
        else:
            rows = [[record[name].get(d) for d in self.domains] for record in self.block]
        return np.array(rows, dtype=np.float64).reshape(len(self.block), len(self.domains))

    def _flush(self) -> None:
        if not self.block:
            return
        steps = np.array([record["step"] for record in self.block], dtype=np.int64)
        where = np.clip((steps - self.start) // self.width, 0, self.count - 1)
        probability = np.nan_to_num(self._matrix("probability"))
        tokens, samples = (np.nan_to_num(self._matrix(name)) for name in ("tokens", "samples"))
        loss = self._matrix("domain_loss")
        present = np.isfinite(loss) & (tokens > 0)
        loss_tokens = np.where(present, tokens, 0.0)
        loss_sum = np.where(present, loss, 0.0) * loss_tokens
        added = {
            "probability": probability,
            "samples": samples,
            "tokens": tokens,
            "loss_sum": loss_sum,
            "loss_tokens": loss_tokens,
        }
        if any("controller_probability" in record for record in self.block):
            self.shadow = True
            for record in self.block:
                record.setdefault("controller_probability", {})
            added["controller"] = np.nan_to_num(self._matrix("controller_probability"))
        # A step without loss weights counts every token alike.
        counted = tokens
        if any("loss_weight" in record for record in self.block):
            self.weighs = True
            alike = dict.fromkeys(self.domains, 1.0)
            for record in self.block:
                record.setdefault("loss_weight", alike)
            counted = tokens * np.nan_to_num(self._matrix("loss_weight"))
        added["weighed"] = np.nan_to_num(_ratio(counted, counted.sum(axis=1, keepdims=True)))
        for name, values in added.items():
            np.add.at(self.sums[name], where, values)
        np.add.at(self.bin_steps, where, 1)
        self.epochs[where] = self._matrix("epochs")
        self.steps.append(steps)
        self.step_tokens.append(tokens.sum(axis=1))
        self.step_loss.append(_ratio(loss_sum.sum(axis=1), loss_tokens.sum(axis=1)))
        self.asked += (probability * samples.sum(axis=1, keepdims=True)).sum(axis=0)
        self._follow(probability)
        self.block = []

    def _follow(self, probability: FloatArray) -> None:
        """Note how far the mixture moves in a block [steps, K]; what a probe holds is no move."""
        held = probability[[record.get("probe") is None for record in self.block]]
        if self.first is None:
            self.first = self.last = (held if len(held) else probability)[0].copy()
        if len(held):
            self.last = held[-1].copy()
            self.moved = np.maximum(self.moved, np.abs(held - self.first).max(axis=0))

    def finish(self) -> Ledger:
        """Return the sums as means and shares."""
        self._flush()
        used = self.bin_steps > 0
        sums = {name: array[used] for name, array in self.sums.items()}
        counts = self.bin_steps[used][:, None]
        edges = np.minimum(self.start + self.width * (np.flatnonzero(used) + 1) - 1, self.last_step)
        notes = []
        if self.repeated:
            notes.append(f"{self.repeated} lines repeat a step and were left out")
        if self.missing:
            notes.append(f"{self.missing} steps are missing from the ledger")
        samples = sums["samples"].sum(axis=0)
        asked_total = self.asked.sum()
        return Ledger(
            domains=self.domains,
            steps=np.concatenate(self.steps) if self.steps else np.zeros(0, dtype=np.int64),
            step_tokens=np.concatenate(self.step_tokens) if self.steps else np.zeros(0),
            step_loss=np.concatenate(self.step_loss) if self.steps else np.zeros(0),
            edges=edges,
            width=self.width,
            probability=sums["probability"] / counts,
            controller=sums["controller"] / counts if self.shadow else None,
            weighed=sums["weighed"] / counts if self.weighs else None,
            share=_ratio(sums["samples"], sums["samples"].sum(axis=1, keepdims=True)),
            loss=_ratio(sums["loss_sum"], sums["loss_tokens"]),
            epochs=self.epochs[used],
            tokens=sums["tokens"].sum(axis=0),
            samples=samples,
            asked=self.asked / asked_total if asked_total else self.asked,
            first=self.first if self.first is not None else np.zeros(len(self.domains)),
            last=self.last,
            moved=self.moved,
            skipped=self.skipped,
            extra_tokens=self.extra_tokens,
            notes=tuple(notes),
        )


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    below = np.broadcast_to(below, above.shape)
    result = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
