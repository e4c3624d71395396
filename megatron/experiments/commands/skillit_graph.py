"""Measure Skill-It's graph: which domain's training lowers which domain's loss.

  tools/mix.py skillit-graph local/quickstart -d configs --seeds 1 2 --jobs 2

One run trains on each domain alone (arXiv 2307.14430).  A_ij = (loss on j before - after) / (loss
on j before), on held-out data, before the first step and at the end.  Domains that are only
measured (target: true) have columns, and no runs.  Several seeds are averaged.

In --out: skillit.yml, which the next run takes beside its own files (method skillit with this
graph), graph.json (the graph alone, for the option `graph`), summary.md, report.html, and table.csv
and table.parquet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import yaml

from megatron.checkpoint.files import write_text
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.experiments.conduct import (
    add_study_arguments,
    base_of,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.fixed_mixtures import (
    Ended,
    add_seeds_argument,
    how_it_ended,
    measured_tokens,
    named_points,
    plan_mixtures,
)
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.skill_graph import Negative, SkillGraph, graph_text, skill_graph
from megatron.experiments.study import Base, Study, ranks_of, static_overrides
from megatron.experiments.table import write_table
from megatron.training.check import preflight

NAME = "skillit-graph"
METHOD = "skillit"
FRAGMENT = "skillit.yml"
GRAPH = "graph.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    add_study_arguments(parser, out="runs/studies/skillit-graph")
    own = parser.add_argument_group("the graph")
    add_seeds_argument(own)
    own.add_argument(
        "--negative",
        choices=[str(one) for one in Negative],
        default=str(Negative.KEEP),
        help="a domain that raises another's loss: keep the number below 0, or write zero, so "
        "that the graph has edges only where training helps (default: keep)",
    )


def run(options: argparse.Namespace) -> int:
    """Run one run per domain and seed, and write the graph; return the exit code."""
    base = base_of(options)
    study = plan_graph(options, base)
    outcome = conduct(study, options)
    if outcome is None:
        return 0
    if outcome.stopped is not None:
        return outcome.exit_code
    ended = how_it_ended(study, outcome)
    out: Path = options.out
    written = list(write_table(ended.rows, out))
    graph, left_out = measured_graph(study, ended, Negative(options.negative))
    text = graph_text(graph, ended.failed, left_out)
    written.append(write_text(out / "summary.md", text))
    if graph is not None:
        content = json.dumps(graph.named(), indent=1, ensure_ascii=False)
        written.append(write_text(out / GRAPH, content))
        written.append(write_fragment(out, graph, steps=study.runs[0].steps))
    print(text, end="")
    print("written: " + " ".join(map(str, written)))
    if graph is not None:
        _tell_how_to_take_it(base, out)
    ended.tell()
    print(write_report(out, command=command_line(options), failed=ended.why))
    return outcome.exit_code


def plan_graph(options: argparse.Namespace, base: Base) -> Study:
    """Plan the runs on one domain alone.

    Raises:
        ConfigError: the losses before and after would not be measured, or the method could not
            take the graph.
    """
    config, gpus = base.load(), gpus_of(options, base)
    domains = tuple(config.trained)
    if len(domains) < 2:
        raise ConfigError(
            f"the configuration trains on {', '.join(domains)} alone; a graph needs two domains"
        )
    start = config.checkpoint
    if start.load and not start.finetune:
        raise ConfigError(
            f"load is {start.load}, and the runs would go on from its step: there is no loss "
            "before their first step; set finetune: true, which starts at step 0"
        )
    measured_tokens(config, all_of=True)
    _check_method(config, base, gpus)
    points = named_points(np.eye(len(domains)), domains)
    return plan_mixtures(base, points, options.seeds, runs_dir(options), name=NAME, gpus=gpus)


def _check_method(config: Config, base: Base, gpus: int) -> None:
    """Refuse before the runs what the method would refuse after them."""
    measured = list(config.domains)
    graph = {name: dict.fromkeys(measured, 1.0) for name in config.trained}
    more = [f"mixing.graph={json.dumps(graph, ensure_ascii=False)}"]
    if config.mixing.method != METHOD:
        even = dict.fromkeys(config.trained, 1.0)
        more = [*static_overrides(config, even), f"mixing.method={METHOD}", *more]
    taken = base.load(more)
    preflight(taken, world_size=ranks_of(taken, gpus), gpus=gpus).domains.close()


def measured_graph(
    study: Study, ended: Ended, negative: Negative
) -> tuple[SkillGraph | None, list[int]]:
    """Return the graph of the seeds whose runs are all finished, and the other seeds.

    Raises:
        RunError: a loss is missing or not finite.
    """
    done = {run.name for run in ended.finished}
    broken = list(dict.fromkeys(run.seed for run in study.runs if run.name not in done))
    domains = study.domains
    runs = {
        (run.seed, domains[int(run.tags["point"])]): run.name
        for run in study.runs
        if run.seed not in broken
    }
    return (skill_graph(ended.rows, runs, negative) if runs else None), broken


def write_fragment(out: Path, graph: SkillGraph, *, steps: int) -> Path:
    """Write ``skillit.yml`` and return its path.

    Args:
        out: folder of the results.
        graph: for the method.
        steps: of the runs that measured it.

    Raises:
        RunError: the disk refuses.
    """
    path = out / FRAGMENT
    seeds = f"{len(graph.seeds)} seed{'s' if len(graph.seeds) > 1 else ''}"
    content = yaml.safe_dump(
        {"mixing": {"method": METHOD, "graph": graph.named()}},
        sort_keys=False,
        allow_unicode=True,
    )
    return write_text(
        path,
        f"# Skill-It with the graph of runs of {steps} steps on each domain alone, {seeds}.\n"
        f"# Train with it: ./deepy.py train.py YOUR_CONFIGS {path}\n"
        "# Its other options (update_every above all: weights change, and losses are measured, so\n"
        f"# often) belong to YOUR_CONFIGS.\n{content}",
    )


def _tell_how_to_take_it(base: Base, out: Path) -> None:
    """Say what to do where the study's own files contradict the fragment."""
    path = (out / FRAGMENT).absolute()
    try:
        taken = Base(
            files=(*base.files, str(path)), conf_dir=base.conf_dir, overrides=base.overrides
        ).load()
        if taken.mixing.method == METHOD:
            return
    except ConfigError:
        pass
    print(
        "the mixing block of the configuration contradicts this file: leave that block out beside "
        f"it, or give --set mixing=null mixing.method={METHOD} mixing.graph={out / GRAPH}"
    )
