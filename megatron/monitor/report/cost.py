"""What mixing cost: seconds and extra tokens by kind, in words and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron.monitor.jsonl import ALL_STEPS
from megatron.monitor.overhead import KINDS, seconds_text
from megatron.monitor.report.load import RunData
from megatron.monitor.throughput import short


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One kind of cost of one run; NaN where it was not measured.

    Attributes:
        kind: one of the kinds of :mod:`megatron.monitor.overhead`, ``""`` for their sum.
        seconds: time it took.
        of_time: that as a share of the training time that was logged.
        tokens: extra tokens.
        of_tokens: those over the tokens that were trained on.
    """

    kind: str
    seconds: float
    of_time: float
    tokens: float
    of_tokens: float


def costs(run: RunData) -> list[Cost]:
    """Return the kinds that ``run`` paid for, in their order, and their sum; empty if none."""
    known = [kind for kind in KINDS if kind in run.overhead or kind in run.ledger.extra_tokens]
    rows = [
        _cost(
            run,
            kind,
            seconds=run.overhead.get(kind, math.nan),
            tokens=run.ledger.extra_tokens.get(kind, math.nan),
        )
        for kind in known
    ]
    if rows:
        rows.append(
            _cost(
                run,
                "",
                seconds=_total([row.seconds for row in rows]),
                tokens=_total([row.tokens for row in rows]),
            )
        )
    return rows


def _cost(run: RunData, kind: str, *, seconds: float, tokens: float) -> Cost:
    training = run.overhead.get(ALL_STEPS, math.nan)
    trained = float(run.ledger.tokens.sum())
    return Cost(
        kind=kind,
        seconds=seconds,
        of_time=seconds / training if training > 0 else math.nan,
        tokens=tokens,
        of_tokens=tokens / trained if trained > 0 else math.nan,
    )


def _total(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) if known else math.nan


def cost_sentences(run: RunData) -> list[str]:
    """Say in a sentence what mixing cost ``run``, the greatest part by name; nothing if unknown."""
    rows = costs(run)
    if not rows:
        return []
    *parts, total = rows
    words = []
    if math.isfinite(total.seconds):
        most = max(parts, key=lambda row: row.seconds if math.isfinite(row.seconds) else -1.0)
        share = (
            f", {total.of_time:.2%} of the training time" if total.of_time == total.of_time else ""
        )
        words.append(f"{seconds_text(total.seconds)}{share} (most of it {most.kind})")
    if math.isfinite(total.tokens):
        by_kind = ", ".join(row.kind for row in parts if math.isfinite(row.tokens))
        words.append(
            f"{short(total.tokens)} extra tokens, {total.of_tokens:.2%} of those trained on "
            f"({by_kind})"
        )
    else:
        words.append("no extra tokens")
    return [f"Mixing cost {' and '.join(words)}."]


def cost_section(runs: Sequence[RunData]) -> str:
    """Return the page's section: kinds down, runs across; nothing if no run recorded any."""
    tables = [{row.kind: row for row in costs(run)} for run in runs]
    kinds = [kind for kind in (*KINDS, "") if any(kind in table for table in tables)]
    if not kinds:
        return ""
    heads = "".join(_head(run, index, len(runs)) for index, run in enumerate(runs))
    body = "".join(_row(kind, tables) for kind in kinds if kind)
    return (
        '<section id="cost"><h2>What mixing cost</h2>'
        '<p class="hint">Seconds, with their share of the training time between the first and the '
        "last logged step; extra tokens, over those trained on. Probe steps train the model too: "
        "their tokens are extra only in that another mixture was held than the best one known."
        "</p>"
        f'<div class="scroll"><table><thead><tr><th scope="col">kind</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot>{_row('', tables)}</tfoot></table></div></section>"
    )


def _head(run: RunData, index: int, count: int) -> str:
    if count == 1:
        return '<th scope="col">seconds</th><th scope="col">extra tokens</th>'
    name = escape(run.name)
    return (
        f'<th scope="col" data-run="{index}"><i class="key"></i>{name}<small>seconds</small></th>'
        f'<th scope="col">{name}<small>extra tokens</small></th>'
    )


def _row(kind: str, tables: Sequence[dict[str, Cost]]) -> str:
    tip = f' title="{escape(KINDS[kind])}"' if kind else ""
    cells = "".join(_cells(table.get(kind)) for table in tables)
    return f'<tr><th scope="row"{tip}>{kind or "all"}</th>{cells}</tr>'


def _cells(cost: Cost | None) -> str:
    if cost is None:
        return "<td>–</td><td>–</td>"
    return _cell(cost.seconds, seconds_text(cost.seconds), cost.of_time) + _cell(
        cost.tokens, short(cost.tokens), cost.of_tokens
    )


def _cell(value: float, text: str, share: float) -> str:
    if not math.isfinite(value):
        return "<td>–</td>"
    beside = f"<small>{share:.2%}</small>" if math.isfinite(share) else ""
    return f"<td>{text}{beside}</td>"
