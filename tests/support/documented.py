"""What is done with each command of the documents when they are tested.

Every command matches a row of ``WAYS``; the first that matches counts.  A command that matches
none fails the tests: add a row, and run the command for real unless there is a reason against it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from support.doc_commands import Command

Quick = Literal["run", "check", "config", "dry-run", "parse", "make", "none"]
DEEPY = r"(\./deepy\.py|python deepy\.py)"
ACTION = r"--(check|plan|print-config|dry-run|sbatch)\b"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How commands of one kind are tested.

    Attributes:
        pattern: that the whole command matches.
        quick: in every test run: ``run`` it as it stands, in this process; ``check`` and
            ``dry-run`` run it with that flag; ``config`` reads its configuration; ``parse`` gives
            its words to the program's own parser and looks for the files that it reads; ``make``
            has make say what it would do.
        slow: among the slow tests it is really run, in a tiny project.
        why: it is not really run; or "".
    """

    pattern: str
    quick: Quick
    slow: bool = False
    why: str = ""


WAYS = (
    Way(pattern=r"make\b.*", quick="make", why="installs, or runs these tests; CI does both"),
    # Of what select_data.py writes, which is not there before it is really run.
    Way(pattern=rf"{DEEPY} .*runs/selection/.*", quick="parse", slow=True),
    Way(pattern=rf"{DEEPY} .*{ACTION}.*", quick="run"),
    Way(pattern=rf"{DEEPY} train\.py configs/mixbench/base\.yml .*", quick="parse", slow=True),
    Way(pattern=rf"{DEEPY} train\.py -d configs local/.*", quick="check", slow=True),
    Way(pattern=rf"{DEEPY} train\.py .*", quick="check", why="trains a model of full size"),
    Way(
        pattern=rf"{DEEPY} evaluate\.py .*--eval_include_path configs/tasks .*",
        quick="config",
        why="reads questions of one's own; tests/e2e/test_selection_training.py makes some",
    ),
    Way(
        pattern=rf"{DEEPY} evaluate\.py .*--eval_tasks lambada_openai .*",
        quick="config",
        why="its questions come from a network; tests/e2e/test_evaluation.py has tasks of its own",
    ),
    Way(pattern=rf"{DEEPY} (generate|evaluate)\.py .*", quick="config", slow=True),
    Way(
        pattern=r"python tools/mix\.py compare (bench|configs/mixbench/\w+)\.yml.*",
        quick="parse",
        why="hours of training; tests/e2e/test_mix_compare.py runs comparisons",
    ),
    Way(
        pattern=r"python tools/select_data\.py (fit|plan) .*",
        quick="parse",
        why="reads finished runs; tests/unit/selection/test_selection_fit_and_plan.py makes some",
    ),
    Way(
        pattern=r"python tools/mix\.py budget .*",
        quick="parse",
        why="reads fitted gains; tests/unit/experiments/test_experiments_budget.py makes some",
    ),
    Way(
        pattern=r"python tools/mix\.py (fit-law|report|regmix --study) .*",
        quick="parse",
        why="reads a finished study; tests/e2e/test_mix_*.py make and read studies",
    ),
    Way(
        pattern=r"python tools/mix\.py .*",
        quick="dry-run",
        why="trains many models; tests/e2e/test_mix_*.py do, with small ones",
    ),
    Way(
        pattern=r"python benchmarks/\w+\.py.*",
        quick="none",
        why="minutes of measuring; tests/unit/scaffold/test_scaffold_benchmarks.py starts each",
    ),
    Way(pattern=r"python prepare_data\.py --list", quick="run"),
    Way(
        pattern=r"python prepare_data\.py mixbench",
        quick="parse",
        why="minutes; two of its families are made by the command with --families",
    ),
    Way(
        pattern=r"python prepare_data\.py quickstart",
        quick="parse",
        why="a minute, and over the tiny project's data; tests/unit/corpora makes it smaller",
    ),
    Way(pattern=r"python prepare_data\.py mixbench --families .*", quick="parse", slow=True),
    Way(pattern=r"python prepare_data\.py .*", quick="parse", why="fetches from a network"),
    # Its libraries take many seconds to import before it parses anything.
    Way(pattern=r"python examples/huggingface_trainer\.py .*", quick="none", slow=True),
    Way(
        pattern=r"python bigram_model\.py .*",
        quick="parse",
        why="wants a test part of 1025 tokens; tests/unit/data/test_data_bigram.py runs it",
    ),
    Way(
        pattern=r"python tools/upload\.py .*",
        quick="parse",
        why="needs a network; tests/unit/exchange uploads to a stand-in",
    ),
    Way(
        pattern=r"python tools/convert_checkpoint\.py --input neox/.*",
        quick="parse",
        why="a checkpoint of tens of gigabytes; tests/unit/exchange makes small ones",
    ),
    Way(
        pattern=r"python tools/fault_campaign\.py .*",
        quick="parse",
        why="minutes to hours; tests/campaign runs the rows, and the command with one of them",
    ),
    Way(
        pattern=r"python tools/merge_datasets\.py --shards .*",
        quick="parse",
        why="joins what sixteen commands wrote; tests/unit/ingest/test_ingest_shards.py runs both",
    ),
    Way(pattern=r"python ((tools|examples)/)?\w+\.py .*", quick="parse", slow=True),
    Way(pattern=r"torchrun .* train\.py -d configs local/.*", quick="none", slow=True),
    Way(pattern=r"tail .* runs/quickstart/.*", quick="none", slow=True),
    Way(pattern=r"sbatch .*", quick="none", why="a cluster"),
    Way(pattern=r"git clone .*", quick="none", why="fetches from a network"),
    Way(
        pattern=r"DS_ACCELERATOR=cuda python benchmarks/\w+\.py.*|python -m pytest .*-m gpu .*",
        quick="none",
        why="wants a GPU",
    ),
    Way(pattern=r"docker .*", quick="none", why="a container engine, and its images"),
    Way(
        pattern=r"source \.venv/bin/activate", quick="none", why="changes the shell it is typed in"
    ),
    Way(
        pattern=r"\.venv/bin/pre-commit install", quick="none", why="changes the repository's hooks"
    ),
)

# What earlier steps of the documents leave behind, and no command of the same page makes.
LEFT_BEHIND = {
    "runs/quickstart": "make quickstart",
    "runs/studies/short": "a sweep, as the page says",
    "runs/studies/mid": "a sweep, as the page says",
    "runs/studies/long": "a sweep, as the page says",
    "bench.yml": "the page shows the file",
    "plans/runs.csv": "a table of a user's runs",
    "plans/exam": "fit, as the page says",
    "plans/own": "fit, on another page",
    "runs/studies/compare": "a comparison, as the page says",
    "exam.jsonl": "a user's examples",
    "chats.jsonl": "a user's conversations",
    "neox": "a checkpoint of GPT-NeoX and its configuration",
    "my-name/quickstart": "a name on the hub",
    "models/chat": "a tokenizer with a chat template",
}


# Flags whose value a program writes, not reads.
OUTPUTS = ("--output", "--output-prefix", "--out", "-o", "--output_dir", "--json")


def output_flags(command: Command) -> tuple[str, ...]:
    """Return the flags of a command whose value it writes."""
    trains = "examples/plain_pytorch.py" in command.words
    return (*OUTPUTS, "--model") if trains else OUTPUTS


def outputs(command: Command) -> list[str]:
    """Return the files, folders or prefixes that a command's flags have it write."""
    words, flags = command.words, output_flags(command)
    return [words[i + 1] for i in range(len(words) - 1) if words[i] in flags] + [*command.makes]


def way_of(command: Command) -> Way | None:
    """Return what is done with a command; ``None`` if nobody has decided."""
    return next((way for way in WAYS if re.fullmatch(way.pattern, command.text)), None)
