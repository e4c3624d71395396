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
            "of the domains; or the path of a JSON file that holds one of these; null = each "
            "domain helps itself alone"
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

    Source: Skill-It (arXiv 2307.14430), algorithm 1; its released code counts
    evaluations where this counts updates.
    """

    method = "skillit"

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
        self._graph = read_graph(options.graph, self.domains)
        self._recent: list[FloatArray] = []
        self._set_weights(self._rule(np.ones(len(self.domains))))

    def _rule(self, losses: FloatArray) -> FloatArray:
        return softmax(saturate(self._eta * (self._graph @ losses)))

    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        if np.isnan(valid_loss).all():
            return None
        known = self._recent[-1] if self._recent else np.zeros(len(self.domains))
        losses = np.where(np.isnan(valid_loss), known, valid_loss)
        self._recent = [*self._recent, losses][-self._history :]
        with np.errstate(over="ignore"):
            return self._rule(saturate(np.sum(self._recent, axis=0)))

    def _save(self) -> dict[str, Any]:
        return {"recent": [self._by_name(losses) for losses in self._recent]}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        recent = rule["recent"]
        if not isinstance(recent, list):
            raise self._damaged("recent", recent)
        read = [self._vector(losses, "recent") for losses in recent]
        if not all(np.isfinite(losses).all() for losses in read):
            raise self._damaged("recent", recent)
        self._recent = read[-self._history :]

    def _estimates(self) -> dict[str, Any]:
        return {"valid_loss": self._by_name(self._recent[-1])} if self._recent else {}


def read_graph(graph: object, domains: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return the graph as a matrix, [K, K].

    Raises:
        ConfigError: rows or values are missing, or of domains that do not exist.
        DataError: the file cannot be read.
    """
    where = "mixing method 'skillit': graph"
    if graph is None:
        return np.eye(len(domains))
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
        by_domain(f"{where}: row '{name}'", row, domains, missing=0.0)
        for name, row in zip(domains, graph, strict=True)
        if _is_row(f"{where}: row '{name}'", row)
    ]
    return np.array(rows)


def _is_row(where: str, row: object) -> bool:
    if isinstance(row, Mapping | Sequence) and not isinstance(row, str):
        return True
    raise ConfigError(f"{where} is {row!r}; give a list of numbers or a mapping by domain")


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
