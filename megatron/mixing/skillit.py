"""Skill-It: sampling what helps the domains whose held-out loss is still high."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError, DataError
from megatron.mixing.base import RunContext
from megatron.mixing.held_out import HeldOutMixer
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions, by_domain, require
from megatron.mixing.simplex import saturate, softmax

_STATE_KEYS: Final = ("recent",)


@dataclass(frozen=True, kw_only=True)
class SkillItOptions(CommonOptions):
    """Options of ``skillit``.

    Raises:
        ConfigError: a number out of its range.
    """

    graph: dict[str, dict[str, float]] | list[list[float]] | str | None = field(
        default=None,
        metadata={
            "help": "how much training on domain i lowers the loss of domain j, as a share of "
            "it: rows i of values j, by name (domains left out of a row count 0) or in the order "
            "of the domains, those that are never trained on last (they have no row); or the path "
            "of a JSON file that holds one of these; null = each domain helps itself alone"
        },
    )
    eta: float = field(
        default=0.2, metadata={"help": "step size of the exponent", "unit": "1 / nat"}
    )
    history: int = field(
        default=3,
        metadata={"help": "updates whose held-out losses are added up", "unit": "updates"},
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        require("eta", self.eta, self.eta > 0, "above 0")
        require("history", self.history, self.history >= 1, "at least 1")


class SkillIt(HeldOutMixer):
    """Weights from the losses of all domains, carried back along a graph of who helps whom.

    p_i is proportional to exp(eta sum_j A_ij) at the start, and after each update to
    exp(eta sum_j A_ij S_j), S_j being the sum of domain j's held-out losses at the last
    ``history`` updates.  A_ij is the share of domain j's loss that training on domain i
    takes away, from one run per domain.  A measurement that lacks a domain takes its
    last known loss; one never measured counts 0.

    j runs over the losses that count for the objective o, those of domains that are never
    trained on among them; S_j is multiplied by o_j times their number (1 for the uniform one).

    Source: Skill-It (arXiv 2307.14430), algorithm 1; its released code counts
    evaluations where this counts updates.
    """

    method = "skillit"
    has_objective = True

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: SkillItOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._eta, self._history = options.eta, options.history
        self._graph = read_graph(options.graph, self.domains, self.measured)
        self._recent: list[FloatArray] = []
        self._check_reach()
        ones = np.ones(len(self.measured))
        self._set_weights(self._rule(ones, self._objective.factors(ones)))

    def _check_reach(self) -> None:
        """Refuse an objective that no domain helps, so that the weights would never move."""
        counted = self._objective.fixed
        if counted is None or self._objective.kind == "uniform" or (self._graph @ counted).any():
            return
        names = [n for n, weight in zip(self.measured, counted, strict=True) if weight > 0]
        raise ConfigError(
            f"mixing method 'skillit': the objective counts {', '.join(names)}, which no domain "
            f"helps by the graph; give a graph whose rows say how much each domain helps them"
        )

    def _rule(self, losses: FloatArray, factors: FloatArray) -> FloatArray:
        counted = self._objective.counted  # so that what does not count moves no rounding
        weighed = saturate(losses * factors)[counted]
        return softmax(saturate(self._eta * (self._graph[:, counted] @ weighed)))

    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        if np.isnan(valid_loss).all():
            return None
        known = self._recent[-1] if self._recent else np.zeros(len(self.measured))
        losses = np.where(np.isnan(valid_loss), known, valid_loss)
        self._recent = [*self._recent, losses][-self._history :]
        # A loss of exactly 0 was never measured: it cannot be the worst.
        factors = self._objective.factors(np.where(losses == 0, np.nan, losses))
        if not factors.any():
            return None
        with np.errstate(over="ignore"):
            return self._rule(saturate(np.sum(self._recent, axis=0)), factors)

    def _save(self) -> dict[str, Any]:
        return {"recent": [self._by_measured(losses) for losses in self._recent]}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        recent = rule["recent"]
        if not isinstance(recent, list):
            raise self._damaged("recent", recent)
        read = [self._measured_vector(losses, "recent") for losses in recent]
        if not all(np.isfinite(losses[: len(self.domains)]).all() for losses in read):
            raise self._damaged("recent", recent)
        self._recent = [np.nan_to_num(losses, nan=0.0) for losses in read[-self._history :]]

    def _estimates(self) -> dict[str, Any]:
        return {"valid_loss": self._by_measured(self._recent[-1])} if self._recent else {}


def read_graph(
    graph: object, domains: Sequence[str], measured: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the graph as a matrix, [K, K + M].

    Args:
        graph: as the option.
        domains: what is trained on: the rows, [K].
        measured: the domains, then those never trained on: the columns, [K + M].

    Raises:
        ConfigError: rows or values are missing, or of domains that do not exist.
        DataError: the file cannot be read.
    """
    where = "mixing method 'skillit': graph"
    if graph is None:
        return np.eye(len(domains), len(measured))
    if isinstance(graph, str):
        where = f"{where}: {graph}"
        graph = _from_file(graph)
    if isinstance(graph, Mapping):
        if graph.keys() != set(domains):
            differing = sorted(graph.keys() ^ set(domains))
            raise ConfigError(
                f"{where} has rows for {sorted(graph)} and the run mixes {sorted(domains)}; give "
                f"a row for every domain and for no other (differing: {', '.join(differing)})"
            )
        graph = [graph[name] for name in domains]
    if not isinstance(graph, Sequence) or isinstance(graph, str) or len(graph) != len(domains):
        raise ConfigError(
            f"{where} must have {len(domains)} rows, one for each domain ({', '.join(domains)})"
        )
    rows = [
        _row(f"{where}: row '{name}'", row, domains, measured)
        for name, row in zip(domains, graph, strict=True)
    ]
    return np.array(rows)


def _row(where: str, row: object, domains: Sequence[str], measured: Sequence[str]) -> FloatArray:
    if not isinstance(row, Mapping | Sequence) or isinstance(row, str):
        raise ConfigError(f"{where} is {row!r}; give a list of numbers or a mapping by domain")
    if isinstance(row, Sequence) and len(row) == len(domains):  # it speaks of the domains alone
        row = [*row, *[0.0] * (len(measured) - len(domains))]
    return by_domain(where, row, measured, missing=0.0)


def _from_file(path: str) -> object:
    try:
        read: object = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"mixing method 'skillit': cannot read the graph {path} ({error.strerror}); give the "
            f"path of a JSON file with a row for each domain, or leave graph out"
        ) from error
    except ValueError as error:
        raise DataError(f"mixing method 'skillit': the graph {path} is no JSON: {error}") from error
    return read
