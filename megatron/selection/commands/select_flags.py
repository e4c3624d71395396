"""The flags of the subcommand select."""

from __future__ import annotations

import argparse

from megatron.selection.choose import ORDERS
from megatron.selection.flags import positive


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how much is kept."""
    group = parser.add_argument_group("how much (one of the first four)")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--share", type=float, metavar="P", help="of the documents, 0.05 = 5 %%")
    one.add_argument("--documents", type=positive, metavar="N", help="so many")
    one.add_argument("--tokens", metavar="N", help="as many as have so many tokens (5e6, 5M)")
    one.add_argument(
        "--flops", metavar="N",
        help="as many as can be trained on once the scoring is paid for too (1e18)",
    )  # fmt: skip
    group.add_argument(
        "--model-size", metavar="SIZE",
        help="with --flops: parameters of the model that will be trained (7B); it may be given by "
        "--config instead, whose attention and vocabulary are then counted too",
    )  # fmt: skip
    group.add_argument(
        "--epochs", type=float, default=1.0, metavar="E",
        help="with --flops: passes that training makes (default: 1)",
    )  # fmt: skip


def add_ranking_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which documents are kept."""
    group = parser.add_argument_group("which")
    group.add_argument(
        "--order", choices=ORDERS, default="top",
        help="top: highest scores first (default); low, mid: the lowest or middle third first, "
        "each third shuffled; sample: drawn, high scores more often",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of shuffles and draws (default: 0)"
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="of sample: low follows the scores, high is even (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--thirds-of", choices=("all", "kept"), default="all",
        help="low, mid: cut all documents into thirds (default), or, as the paper's program, only "
        "what is kept, which is then the lowest scores",
    )  # fmt: skip
    group.add_argument(
        "--per-source", choices=("share", "equal"),
        help="take the same share of every source, or equally much of each as long as it lasts",
    )  # fmt: skip


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where a choice goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of all files")
    group.add_argument("--name", metavar="NAME", help="what the files' names begin with")
    group.add_argument(
        "--task", metavar="NAME", help="in the names (default: what the targets were called)"
    )
    group.add_argument(
        "--epoch", type=int, default=0, metavar="E",
        help="in the name of a choice by perplexity: how long its model was trained (default: 0)",
    )  # fmt: skip
    group.add_argument("--domain", metavar="NAME", help="name of the domain (default: TASK-METHOD)")
    group.add_argument(
        "--workers", type=positive, default=1, metavar="N",
        help="processes that tokenise (default: 1)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="write over what is there")
    group.add_argument("--dry-run", action="store_true", help="say what would be kept, no more")
