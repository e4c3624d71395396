r"""Plan a budget: which selector is compute-optimal, and which part of it goes into choosing.

    tools/select_data.py plan plans/exam --budget 1e20 --size 7B 13B 70B
    tools/select_data.py plan plans/exam --budget 1e19 1e20 --size 7B --corpus-tokens 1e9 \
        --selector ppl=7B less=7B embed=110M

Reads the laws that `fit` has left.  Choosing and training are charged to one budget by one formula;
what a law says beyond the sizes and the compute of its runs is marked.

In --out: plan.json, plan.md, figures as PNG, report.html.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.checkpoint.files import write_text
from megatron.selection.break_even import break_even_budget, rivals_of
from megatron.selection.budget_plan import Choice, plan_choices
from megatron.selection.budget_report import write_report
from megatron.selection.budget_text import honest_lines, plan_facts, plan_text
from megatron.selection.commands.planning import (
    add_break_even_arguments,
    add_price_arguments,
    asked_model,
    asked_prices,
    command_words,
    found_break_even,
    refuse_idle_prices,
    write_json,
)
from megatron.selection.commands.shared import parser_of
from megatron.selection.cost_model import FREE, Model, base_method, read_number, sized_model
from megatron.selection.figures_plan import break_even_figure, simulation_figure
from megatron.selection.gains import Gains, methods_of, read_gains, sizes_of
from megatron.selection.prices import Prices


def make_parser(prog: str, words: list[str]) -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = parser_of(prog, __doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("gains", type=Path, metavar="GAINS", help="--out of fit, or its gains.json")
    parser.add_argument(
        "--budget",
        nargs="+",
        required=True,
        metavar="FLOPS",
        help="operations for choosing and training together, one or more: 1e19 1e20",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=[],
        metavar="SIZE",
        help="models to train: 7B 13B, or configuration files of them (default: those fitted)",
    )
    parser.add_argument("--task", metavar="NAME", help="of the fit (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results (default: 'plan' in GAINS)"
    )
    add_price_arguments(parser)
    add_break_even_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Plan, print and write; return the exit code."""
    refuse_idle_prices(options)
    gains = read_gains(options.gains)
    prices = asked_prices(options)
    budgets = [read_number(text, "--budget") for text in options.budget]
    tasks = gains.tasks if options.task is None else (options.task,)
    folder = options.gains if options.gains.is_dir() else options.gains.parent
    out: Path = options.out or folder / "plan"
    whole, facts, pictures, main, rest = "", [], [], [], []
    for task in tasks:
        laws = gains.of(task)
        models = [asked_model(text, options.vocab_size) for text in options.size] or [
            sized_model(size) for size in sizes_of(laws)
        ]
        choices = plan_choices(gains, task, models, budgets, prices)
        sizes = found_break_even(gains, task, prices, options)
        least = least_budgets(gains, task, models, prices, options.against)
        whole += plan_text(gains, task, choices, sizes, least, prices)
        facts.append(plan_facts(gains, task, choices, sizes, least, prices))
        pictures += [
            simulation_figure(gains, task, models, prices),
            break_even_figure(gains, task, prices, sizes, options.against),
        ]
        main += [said(one) for one in choices if one.best]
        rest += honest_lines(gains, choices)
    drawn = [picture for picture in pictures if picture is not None]
    written = [
        write_json({"format": 1, "plans": facts}, out / "plan.json"),
        write_text(out / "plan.md", whole),
        *(picture.write(out) for picture in drawn),
        write_report(
            out,
            title="Plan of a budget",
            command=command_words(options),
            tiles=[
                ("budget (FLOPs)", ", ".join(f"{one:.3g}" for one in budgets)),
                ("tasks", ", ".join(tasks)),
            ],
            sentences=(main or ["No selector leaves anything to train with."], rest),
            markdown=whole,
            pictures=drawn,
        ),
    ]
    print(whole, end="")
    print("written: " + " ".join(map(str, written)))
    return 0


def said(one: Choice) -> str:
    """Return a best choice in a sentence."""
    return (
        f"{one.task}, {one.model.name}, {one.budget:.3g} FLOPs: {one.method}, with "
        f"{one.choosing_share:.1%} of the budget on choosing (best in {one.best_in:.0%} of the "
        "laws that the runs allow)."
    )


def least_budgets(
    gains: Gains, task: str, models: list[Model], prices: Prices, against: str | None
) -> dict[tuple[str, str], float]:
    """Return the break-even budgets by the trained model's name and method."""
    laws = gains.of(task)
    if not rivals_of(laws, against):
        return {}
    return {
        (model.name, name): break_even_budget(gains, task, model, name, prices, against)
        for model in models
        for name in methods_of(laws)
        if base_method(name) not in FREE and name != against
    }
