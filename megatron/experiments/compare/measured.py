"""What each run that counts came to: losses at its end, the mixture that drew, and its bill."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.config import resolve_batch
from megatron.errors import RunError
from megatron.experiments.compare.budget import whole_bill
from megatron.experiments.compare.cadence import acts_on_reports, reviewed_tokens
from megatron.experiments.flops import Charges, charge, spent_by_ledger
from megatron.experiments.study import PlannedRun
from megatron.experiments.table import Row
from megatron.mixing.base import Signal
from megatron.registry import mixing_methods
from megatron.training.domains import open_run_domains
from megatron.training.layout import run_layout


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of one run that counts.

    Attributes:
        run: its name.
        seed: of the run.
        steps: that it took.
        tokens: that it trained on.
        loss: by measured domain, nats per token.
        weights: mean of what drew, by domain.
        seconds_per_step: of training, by the logged rates; noisy.
        charges: the whole bill, runs before it included, as the ledgers say.
    """

    run: str
    seed: int
    steps: int
    tokens: int
    loss: Mapping[str, float]
    weights: Mapping[str, float]
    seconds_per_step: float
    charges: Charges

    @property
    def finite(self) -> bool:
        """Whether every loss is."""
        return all(math.isfinite(loss) for loss in self.loss.values())

    def objectives(self, entropies: Mapping[str, float]) -> dict[str, float]:
        """Return everything that methods are compared by.

        Args:
            entropies: known floors by domain, nats per token; none: no excess.
        """
        losses = np.array(list(self.loss.values()))
        perplexities = np.exp(np.minimum(losses, 50.0))
        found = {
            "average": float(losses.mean()),
            "worst": float(losses.max()),
            "average_perplexity": float(perplexities.mean()),
            "worst_perplexity": float(perplexities.max()),
        }
        if entropies:
            excess = np.array([loss - entropies[name] for name, loss in self.loss.items()])
            found |= {
                "average_excess": float(excess.mean()),
                "worst_excess": float(excess.max()),
            }
        return found


def run_end(
    rows: Mapping[str, Sequence[Row]],
    chain: Sequence[tuple[str, PlannedRun]],
    split: str,
) -> End:
    """Return what a chain came to.

    Args:
        rows: of the table, by key of the run.
        chain: its runs with their roles; the one that counts is the last.
        split: that is compared.

    Raises:
        RunError: the run that counts was not measured at its end.
    """
    final = chain[-1][1]
    last = [row for row in rows[final.key] if row["last"]]
    measured = [row for row in last if row["split"] == split]
    if not measured:
        raise RunError(
            f"run '{final.name}' has no {split} loss at its end; remove {final.folder}, and the "
            f"run is done again"
        )
    one = measured[0]
    bills = [(role, run_charges(run, rows[run.key])) for role, run in chain]
    return End(
        run=final.name,
        seed=final.seed,
        steps=one["step"],
        tokens=one["tokens"],
        loss={row["domain"]: row["loss"] for row in measured},
        weights=json.loads(one["weights"]),
        seconds_per_step=one["seconds"] / one["step"] if one["step"] else math.nan,
        charges=whole_bill(bills[-1][1], bills[:-1]),
    )


def run_charges(run: PlannedRun, rows: Sequence[Row]) -> Charges:
    """Return the bill of one run as its ledger says; see :func:`..cadence.Cadence.charges`."""
    last = next(row for row in rows if row["last"])
    extra: dict[str, float] = dict(json.loads(last["extra_by_kind"]))
    if steering := _reviewed(run):
        extra["validation"] = extra.get("validation", 0) + steering
    needs = mixing_methods[run.method].needs
    spent = spent_by_ledger(
        last["tokens"], extra, foresight_trains=Signal.GRADIENT_ALIGNMENT.value in needs
    )
    return charge(run.config.model, spent)


def _reviewed(run: PlannedRun) -> int:
    """Return the tokens of report validations that steered a run."""
    if not acts_on_reports(run.config):
        return 0
    total = resolve_batch(run.config.batch, run_layout(run.config, run.ranks).data_size)[2]
    domains = open_run_domains(run.config)
    try:
        return int(reviewed_tokens(run.config, domains, total)[-1])
    finally:
        domains.close()


def mean_charges(many: Sequence[Charges]) -> dict[str, Any]:
    """Return the mean of bills by kind, with their totals' mean and greatest."""
    kinds = list(vars(many[0]))
    means = {kind: float(np.mean([vars(one)[kind] for one in many])) for kind in kinds}
    totals = [one.total for one in many]
    return {**means, "total": float(np.mean(totals)), "most": max(totals)}
