"""What the subcommands ``fit`` and ``plan`` share: flags of prices, and what is made of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
from megatron.checkpoint.files import write_text
from megatron.config import load_config
from megatron.errors import ConfigError
from megatron.selection.break_even import SHARES, BreakEven, break_even_sizes, rivals_of
from megatron.selection.cost_model import (
    Model,
    Reading,
    base_method,
    known_model,
    read_number,
    sized_model,
)
from megatron.selection.flags import refuse_idle
from megatron.selection.gains import Gains
from megatron.selection.prices import Prices
from megatron.training.summary import tokenizer_vocabulary


def add_price_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what choosing costs."""
    group = parser.add_argument_group(
        "what choosing costs (by default: as the runs were charged, on their corpus)"
    )
    group.add_argument(
        "--corpus-tokens",
        metavar="N",
        help="tokens of the whole corpus, scored once: 1e9, 300B; training on them is C_total",
    )
    group.add_argument(
        "--target-tokens",
        default="0",
        metavar="N",
        help="tokens of the target examples, which embed and less read too (default: 0)",
    )
    group.add_argument(
        "--selector",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD=SIZE",
        help="model that scores: ppl=7B embed=110M less=7B; or a configuration file of it",
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="of models that are named by a configuration file which does not say it",
    )
    group.add_argument(
        "--less-checkpoints",
        type=int,
        default=1,
        metavar="N",
        help="checkpoints that less takes gradients at, each at three forward passes' worth "
        "(default: 1, as the paper counts; its authors' code runs 4)",
    )
    group.add_argument(
        "--warm-up-tokens",
        metavar="N",
        help="that less trains on first (default: four passes over 5%% of the corpus)",
    )


def add_break_even_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the break-even sizes."""
    group = parser.add_argument_group("break-even sizes")
    group.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=list(SHARES),
        metavar="S",
        help="budgets, as parts of training on the whole corpus (default: 0.05 0.1 0.25 0.5)",
    )
    group.add_argument(
        "--against",
        metavar="METHOD",
        help="what has to be beaten (default: the best of the selectors that cost nothing)",
    )


def refuse_idle_prices(options: argparse.Namespace) -> None:
    """Refuse flags of prices that no model of --selector depends on.

    Raises:
        ConfigError: naming the first of them.
    """
    flags = argparse.ArgumentParser()
    add_price_arguments(flags)
    priced = {base_method(text.partition("=")[0]) for text in options.selector}
    if "less" not in priced:
        refuse_idle(options, flags, ["less-checkpoints", "warm-up-tokens"], "--selector less=SIZE")
    if not priced & {"embed", "less"}:
        where = "--selector embed=SIZE or less=SIZE"
        refuse_idle(options, flags, ["target-tokens"], where)


def asked_prices(options: argparse.Namespace) -> Prices:
    """Return the prices that the command line gives.

    Raises:
        ConfigError: a size cannot be read, or a configuration is refused.
    """
    selectors = {}
    for text in options.selector:
        name, is_pair, size = text.partition("=")
        if not is_pair:
            raise ConfigError(f"--selector {text}: write METHOD=SIZE, such as ppl=7B")
        selectors[name] = asked_model(size, options.vocab_size)
    reading = None
    if options.corpus_tokens is not None:
        warm = options.warm_up_tokens
        reading = Reading(
            corpus=read_number(options.corpus_tokens, "--corpus-tokens"),
            targets=_or_zero(options.target_tokens, "--target-tokens"),
            warm_up=None if warm is None else _or_zero(warm, "--warm-up-tokens"),
            checkpoints=options.less_checkpoints,
        )
    return Prices(reading=reading, selectors=selectors)


def asked_model(text: str, vocab_size: int | None = None) -> Model:
    """Return the model of a size (``7B``) or of a configuration file.

    Raises:
        ConfigError: it is neither, or its vocabulary is not known.
    """
    try:
        return sized_model(text)
    except ConfigError:
        path = Path(text)
        if not (path.is_file() or path.with_suffix(".yml").is_file()):
            raise ConfigError(
                f"'{text}' is neither a size such as 7B nor a configuration file"
            ) from None
    # A model's own file names no data, and none is opened for a price.
    config = load_config([text], overrides=["domains={any: {train: any}}"])
    known = config.model.vocab_size or tokenizer_vocabulary(config.tokenizer)
    size = known or vocab_size
    if size is None:
        raise ConfigError(
            f"{text}: the price of the output layer follows from vocab_size; set it there, or "
            "give --vocab-size"
        )
    return known_model(config.model.model_copy(update={"vocab_size": size}), path.stem)


def _or_zero(text: str, what: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else read_number(text, what)


def found_break_even(
    gains: Gains, task: str, prices: Prices, options: argparse.Namespace
) -> list[BreakEven]:
    """Return the break-even sizes; none where nothing that is free was fitted to compare with."""
    if not rivals_of(gains.of(task), options.against):
        return []
    return break_even_sizes(gains, task, prices, shares=options.shares, against=options.against)


def write_json(facts: dict[str, Any], path: Path) -> Path:
    """Write facts and return the path.

    Raises:
        RunError: the disk refuses.
    """
    return write_text(path, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False))


def command_words(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the words that a command was given; empty if it was not called from a shell."""
    return tuple(getattr(options, "words", ()))
