"""What outputs are called: the names of the paper's released data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.selection.choose import Ranking

_RELEASED = {"embed": "embedding"}
_NO_TASK = "any"


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What the name of an output is made of.

    Attributes:
        task: name of the targets together; "" without.
        method: of the scores.
        parameters: of the method.
        ranking: how documents were ranked.
        share: of the documents that was kept, or asked for.
        epoch: of the model that measured perplexity: how long it had been trained.
    """

    task: str
    method: str
    parameters: Mapping[str, Any]
    ranking: Ranking
    share: float
    epoch: int = 0


def output_name(naming: Naming) -> str:
    """Return ``TASK-train-pSHARE-METHOD``, with what tells choices of one method apart.

    That is ``bm25``, ``embedding``, ``ppl-epochE-ORDER-ppl-SEED``, ``less-seedS``,
    ``random-seedS``; after the others than perplexity stands an order that is not ``top``, with
    its seed.
    """
    share = repr(round(naming.share, 6))
    return f"{task_name(naming.task)}-train-p{share}-{_method(naming)}"


def domain_name(task: str, method: str) -> str:
    """Return what a domain of chosen documents is called."""
    return f"{task_name(task)}-{_RELEASED.get(method, method)}"


def task_name(task: str) -> str:
    """Return a task as a file's name may hold it."""
    name = "".join("-" if letter in '/\\:*?"<>| ' else letter for letter in task)
    return name.strip(".-") or _NO_TASK


def _method(naming: Naming) -> str:
    ranking, method = naming.ranking, naming.method
    if method == "ppl":
        return f"ppl-epoch{naming.epoch}-{ranking.order}-ppl-{ranking.seed}"
    name = _RELEASED.get(method, method)
    if method in ("less", "random"):
        name += f"-seed{naming.parameters.get('seed', 0)}"
    if ranking.order != "top":
        name += f"-{ranking.order}-seed{ranking.seed}"
    return name
