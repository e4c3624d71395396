"""Which layers each pipeline stage holds: arithmetic on a list of weights, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron.errors import ConfigError

_METHODS = "uniform, parameters, or type:REGEX (for example type:transformer)"


def layer_weights(method: str, *, names: Sequence[str], parameters: Sequence[int]) -> list[float]:
    """Return what each layer counts when layers are dealt out to stages.

    Args:
        method: ``pipe_partition_method``: ``uniform`` (1 a layer), ``parameters`` (its number
            of parameters) or ``type:REGEX`` (1 where the expression is found in the name of
            the layer's class, in whatever case; otherwise 0).
        names: class names of the layers.
        parameters: number of parameters of each.

    Raises:
        ConfigError: the method is unknown, the expression is none, or no class matches.
    """
    kind, _, expression = method.partition(":")
    kind = kind.strip().lower()
    if kind == "uniform" and not expression:
        return [1.0] * len(names)
    if kind == "parameters" and not expression:
        return [float(count) for count in parameters]
    if kind != "type" or not expression:
        raise ConfigError(f"pipe_partition_method is '{method}'; it can be {_METHODS}")
    try:
        pattern = re.compile(expression, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"pipe_partition_method is '{method}', whose part after 'type:' is no regular "
            f"expression ({error}); write for example type:transformer"
        ) from None
    weights = [1.0 if pattern.search(name) else 0.0 for name in names]
    if not any(weights):
        raise ConfigError(
            f"pipe_partition_method is '{method}', which no layer's class matches; the classes "
            f"are {', '.join(dict.fromkeys(names))}"
        )
    return weights


def stage_bounds(weights: Sequence[float], stages: int) -> list[int]:
    """Cut a list of layers into ``stages`` contiguous parts with the smallest largest weight.

    The cut is exact and depends on nothing but the arguments.  Of the cuts whose heaviest part
    is lightest it takes the one that is, in this order: most even in weight (least sum of
    squares), most even in number of layers, lightest towards the two ends (which also hold
    embedding and output), and largest in the earlier parts.

    Args:
        weights: what each layer counts, at least 0.
        stages: number of parts, at least 1.

    Returns:
        ``stages + 1`` bounds; part s is the layers from bound s up to before bound s + 1, and
        holds at least one.

    Raises:
        ConfigError: there are fewer layers that count than stages.
        ValueError: a weight is negative or not finite, or ``stages`` is below 1.
    """
    if stages < 1 or not weights or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"cannot cut layers of weights {list(weights)} into {stages} stages")
    counting = sum(weight > 0 for weight in weights)
    if stages > 1 and counting < stages:
        raise ConfigError(
            f"pipe_parallel_size is {stages}, but pipe_partition_method counts only {counting} "
            f"of the model's {len(weights)} layers: every stage needs one of them; use at most "
            f"{max(1, counting)} stages, or another pipe_partition_method"
        )
    sums = _prefix_sums(weights)
    return _most_even(sums, stages, _least_maximum(sums, stages))


def _prefix_sums(weights: Sequence[float]) -> list[int]:
    """Return the sums of the first 0, 1, … weights, in units that make them whole numbers."""
    exact = [Fraction(weight) for weight in weights]
    unit = max(weight.denominator for weight in exact)  # all are powers of two
    sums = [0]
    for weight in exact:
        sums.append(sums[-1] + int(weight * unit))
    return sums


def _least_maximum(sums: list[int], parts: int) -> int:
    """Return the smallest largest sum of ``parts`` contiguous parts.

    By bisection: ``limit`` is enough if filling part after part up to it needs no more parts.
    That every part must hold a layer costs nothing: parts may always be cut further.
    """
    low, high = 0, sums[-1]
    while low < high:
        limit = (low + high) // 2
        if _parts_needed(sums, limit) <= parts:
            high = limit
        else:
            low = limit + 1
    return low


def _parts_needed(sums: list[int], limit: int) -> int:
    needed, start = 1, 0
    for end in range(1, len(sums)):
        if sums[end] - sums[end - 1] > limit:
            return len(sums)
        if sums[end] - sums[start] > limit:
            needed, start = needed + 1, end - 1
    return needed


def _most_even(sums: list[int], parts: int, limit: int) -> list[int]:
    """Return the best cut into parts of at most ``limit``, by dynamic programming.

    ``costs[end]`` is the least cost of the layers before ``end`` in the parts so far; costs
    are added up part by part, so the least of them is found exactly.
    """
    layers = len(sums) - 1
    costs: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}
    starts: list[dict[int, int]] = []
    for part in range(parts):
        from_middle = (2 * part - (parts - 1)) ** 2
        found: dict[int, tuple[int, int, int]] = {}
        best: dict[int, int] = {}
        for end in range(part + 1, layers - (parts - 1 - part) + 1):
            for start in range(end - 1, part - 1, -1):
                weight = sums[end] - sums[start]
                if weight > limit:
                    break
                if start not in costs:
                    continue
                even, many, outer = costs[start]
                cost = (
                    even + weight**2,
                    many + (end - start) ** 2,
                    outer + from_middle * weight,
                )
                # Starts run downwards: of equal costs the first, with the larger parts before.
                if end not in found or cost < found[end]:
                    found[end], best[end] = cost, start
        costs = found
        starts.append(best)
    bounds = [layers]
    for best in reversed(starts):
        bounds.append(best[bounds[-1]])
    return bounds[::-1]
