"""What a user asks of a mixture that is looked for: bounds by domain, and which losses count."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray, make_bounds

Limit = float | dict[str, float]


def limit(text: str) -> Limit:
    """Read a number, or ``name=number`` pairs with commas between.

    Raises:
        ArgumentTypeError: it is neither.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [pair.rpartition("=") for pair in text.split(",")]
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor pairs such as code=0.1,prose=0.2"
        ) from None


def add_bound_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the least and the greatest weight of a domain."""
    parser.add_argument(
        "--floor",
        type=limit,
        default=0.0,
        metavar="P",
        help="least weight: of all domains, or of some: code=0.1,prose=0.2",
    )
    parser.add_argument(
        "--ceiling", type=limit, default=1.0, metavar="P", help="greatest weight, likewise"
    )


def add_aim_arguments(parser: argparse._ActionsContainer) -> None:
    """Add what only the mixture that is looked for must keep to, and which losses count."""
    parser.add_argument(
        "--max-epochs",
        type=limit,
        metavar="E",
        help="most passes over a domain's data in the run that the mixture is for, likewise",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="of that run, for --max-epochs (default: as many as the study's runs)",
    )
    parser.add_argument(
        "--objective",
        type=limit,
        metavar="WEIGHTS",
        help="how much every measured domain counts: code=2,prose=1 (default: all alike)",
    )


def asked_bounds(options: argparse.Namespace, sizes: Mapping[str, float], tokens: float) -> Bounds:
    """Return the mixtures that the command line allows.

    Args:
        options: with the flags of the two functions above.
        sizes: training tokens that there are of each domain.
        tokens: of the study's runs, where ``--tokens`` names no others.

    Raises:
        ConfigError: a limit is out of range, or no mixture keeps to all of them.
    """
    return make_bounds(
        tuple(sizes),
        floor=options.floor,
        ceiling=options.ceiling,
        max_epochs=options.max_epochs,
        samples_per_epoch=list(sizes.values()),
        samples=tokens if options.tokens is None else options.tokens,
    )


def objective(given: Limit | None, measured: Sequence[str]) -> FloatArray | None:
    """Return the weights of the measured domains in the objective, [M]; None: all alike.

    Raises:
        ConfigError: an unknown domain, or a number in place of pairs.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"--objective is {given}; write pairs, such as code=2,prose=1")
    for name in given:
        if name not in measured:
            raise ConfigError(f"--objective: {name} is not measured ({', '.join(measured)})")
    return np.array([given.get(name, 0.0) for name in measured])
