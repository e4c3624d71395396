"""One run in figures: the table of domains and the sentences above it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.monitor.report.cost import cost_sentences
from megatron.monitor.report.load import RunData
from megatron.monitor.throughput import short

# Below this a probability has moved by less than the plan's own rounding shows.
STILL = 1e-6


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """One domain in one run; NaN where something was not measured.

    Attributes:
        name: the domain.
        first: probability at the first step.
        last: probability at the last step.
        asked: mean probability, weighted by the samples of each step.
        realised: share of the samples that were trained on.
        token_share: share of the tokens that counted in the loss.
        tokens: number of those tokens.
        epochs: passes over the domain.
        start: first validation loss, nats per token.
        end: last validation loss.
        bits_per_byte: last validation loss in bits per byte of text.
    """

    name: str
    first: float
    last: float
    asked: float
    realised: float
    token_share: float
    tokens: float
    epochs: float
    start: float
    end: float
    bits_per_byte: float

    @property
    def change(self) -> float:
        """Relative change of the validation loss, NaN if it cannot be told."""
        return self.end / self.start - 1 if self.start > 0 else math.nan


def domain_rows(run: RunData) -> list[DomainRow]:
    """Return a row for each domain of ``run``."""
    ledger = run.ledger
    samples, tokens = float(ledger.samples.sum()) or 1.0, float(ledger.tokens.sum()) or 1.0
    first = run.validations[0].loss if run.validations else {}
    last = run.validations[-1].loss if run.validations else {}
    bits = run.validations[-1].bits_per_byte if run.validations else {}
    return [
        DomainRow(
            name=name,
            first=float(ledger.first[k]),
            last=float(ledger.last[k]),
            asked=float(ledger.asked[k]),
            realised=float(ledger.samples[k]) / samples,
            token_share=float(ledger.tokens[k]) / tokens,
            tokens=float(ledger.tokens[k]),
            epochs=float(ledger.epochs[-1, k]),
            start=first.get(name, math.nan) if len(run.validations) > 1 else math.nan,
            end=last.get(name, math.nan),
            bits_per_byte=bits.get(name, math.nan),
        )
        for k, name in enumerate(ledger.domains)
    ]


def run_sentences(run: RunData, rows: list[DomainRow]) -> list[str]:
    """Say in words what happened in ``run``."""
    return [*_loss_sentences(run, rows), *_mixture_sentences(run, rows), *cost_sentences(run)]


def _loss_sentences(run: RunData, rows: list[DomainRow]) -> list[str]:
    if len(run.validations) < 2:
        count = "only once" if run.validations else "not yet"
        return [f"Held-out loss was measured {count}, so its course cannot be told."]
    start, end = run.validations[0], run.validations[-1]
    # A domain that was measured at one end only would make the two means incomparable.
    common = [name for name in start.loss if name in end.loss]
    before, after = start.average(common), end.average(common)
    sentences = [
        f"Mean held-out loss over {len(common)} domains went from {before:.4f} at step "
        f"{start.step:,} to {after:.4f} nats per token at step {end.step:,} "
        f"({percent(after / before - 1)})."
    ]
    known = [row for row in rows if math.isfinite(row.change)]
    worse = [row for row in known if row.change > 0]
    if worse:
        names = ", ".join(f"{row.name} {percent(row.change)}" for row in worse[:4])
        more = f" and {len(worse) - 4} more" if len(worse) > 4 else ""
        sentences.append(f"{len(worse)} of {len(known)} domains got worse: {names}{more}.")
    elif len(known) > 1:
        best, least = min(known, key=_change), max(known, key=_change)
        sentences.append(
            f"Every domain improved, {best.name} the most ({percent(best.change)}) and "
            f"{least.name} the least ({percent(least.change)})."
        )
    return sentences


def _change(row: DomainRow) -> float:
    return row.change


def _mixture_sentences(run: RunData, rows: list[DomainRow]) -> list[str]:
    moved = run.ledger.moved
    sentences = []
    if not len(moved) or float(moved.max()) < STILL:
        sentences.append("The sampling probabilities stayed as they were throughout.")
    else:
        k = int(moved.argmax())
        row = rows[k]
        sentences.append(
            f"The mixture moved: {row.name} the most, up to {100 * float(moved[k]):.2g} points "
            f"from where it began ({row.first:.2%} at first, {row.last:.2%} at the end)."
        )
    gap = max(rows, key=lambda row: abs(row.realised - row.asked))
    sentences.append(
        f"What was drawn follows what was asked to within "
        f"{100 * abs(gap.realised - gap.asked):.2g} points ({gap.name}: asked {gap.asked:.2%}, "
        f"drawn {gap.realised:.2%} of the samples)."
    )
    repeated = [row for row in rows if row.epochs > 1]
    if repeated:
        most = max(repeated, key=lambda row: row.epochs)
        count = f"{len(repeated)} domains were" if len(repeated) > 1 else "One domain was"
        sentences.append(
            f"{count} seen more than once; {most.name} the most, {most.epochs:.2f} times."
        )
    if run.ledger.skipped:
        sentences.append(f"{run.ledger.skipped:,} steps were skipped (their update was dropped).")
    return sentences


def progress(run: RunData) -> str:
    """Return how far the run is, in words."""
    done = f"{run.last_step:,}"
    if run.total_steps is None:
        return f"{done} steps"
    if run.last_step >= run.total_steps:
        return f"all {run.total_steps:,} steps"
    return f"step {done} of {run.total_steps:,}"


def tiles(run: RunData) -> list[tuple[str, str]]:
    """Return (caption, figure) pairs for the head of the page."""
    ledger = run.ledger
    result = [
        ("progress", progress(run)),
        ("tokens", short(float(ledger.tokens.sum()))),
        ("domains", f"{len(ledger.domains)}"),
    ]
    parameters = run.info.get("parameters")
    if isinstance(parameters, int | float) and parameters > 0:
        result.insert(0, ("parameters", short(float(parameters))))
    if run.mixing:
        result.insert(0, ("mixing", run.mixing))
    rate = run.metrics.get("tokens_per_second")
    if rate is not None:
        known = rate[rate == rate]
        result.append(("tokens per second", short(float(sorted(known)[len(known) // 2]))))
    return result


def percent(ratio: float) -> str:
    """Return a relative change as ``−12.3%``."""
    if not math.isfinite(ratio):
        return "–"
    digits = 1 if abs(ratio) >= 0.01 else 2
    return f"{100 * ratio:+.{digits}f}".replace("-", "−") + "%"
