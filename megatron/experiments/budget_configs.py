"""Configurations of runs that the joint search proposes, and what comes before them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.files import write_text
from megatron.config import Config, resolve_batch
from megatron.errors import ConfigError
from megatron.experiments.budget_search import Candidate
from megatron.experiments.compare.blocks import mixing_overrides
from megatron.experiments.study import Base, ranks_of
from megatron.selection.cost_model import base_method
from megatron.selection.names import task_name
from megatron.training.layout import run_layout

_TOOL = "tools/select_data.py"
_TARGETED = ("bm25", "embed", "less")
SCORED_BY_MODELS = ("embed", "ppl", "less")


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How the commands that choose are to be given.

    Attributes:
        targets: words after ``--target``.
        scorers: what scores, by selector: the ``--model`` of its command.
        checkpoints: of ``less``.
    """

    targets: tuple[str, ...] = ()
    scorers: Mapping[str, str] | None = None
    checkpoints: int = 1


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A run that was written down.

    Attributes:
        config: its configuration file.
        script: the commands that choose and train, in order.
        steps: of the run.
    """

    config: Path
    script: Path
    steps: int


def write_proposal(
    base: Base, one: Candidate, place: int, out: Path, choosing: Choosing, *, gpus: int = 0
) -> Proposal:
    """Write the configuration of a candidate and its commands.

    Args:
        base: the configuration with the candidate's model.
        one: the candidate.
        place: in the ranking, from 1.
        out: folder of the results.
        choosing: how commands are given.
        gpus: CUDA devices of a machine that the run starts on.

    Raises:
        ConfigError: a domain has no held-out text of its own, a selector lacks targets or what
            scores, or the budget pays for no step.
        RunError: the disk refuses.
    """
    config = base.load()
    steps = steps_of(config, one, gpus)
    name = f"run-{place}"
    overrides = [f"train_iters={steps}", f"run_dir={json.dumps(str(out / 'runs' / name))}"]
    if one.mixing.block is not None:
        overrides += mixing_overrides(config, one.mixing.block)
    words: list[list[str]] = []
    if one.share < 1:
        domains, words = _choose(base, config, one, out, choosing)
        overrides += domains
    text = base.load(overrides).resolved_yaml()
    head = (
        f"# {one.model.name}, {one.share:.2%} of the corpus by {one.selector}, mixing: "
        f"{one.mixing.name}; {one.spent:.3g} FLOPs in all.\n"
        f"# Before: the commands of {name}.sh, which choose the documents.\n"
    )
    path = write_text(out / f"{name}.yml", head + text)
    lines = ["#!/bin/sh", "# Chooses the documents, then trains.", "set -e"]
    lines += [shlex.join(["python", _TOOL, *command]) for command in words]
    lines.append(shlex.join(["./deepy.py", "train.py", str(path)]))
    script = write_text(out / f"{name}.sh", "\n".join(lines) + "\n")
    script.chmod(0o755)
    return Proposal(config=path, script=script, steps=steps)


def steps_of(config: Config, one: Candidate, gpus: int) -> int:
    """Return the training steps that a candidate's training budget pays for.

    Raises:
        ConfigError: not even one.
    """
    size = run_layout(config, ranks_of(config, gpus)).data_size
    samples = resolve_batch(config.batch, size)[2]
    tokens = samples * (config.model.seq_length or 0)
    steps = int(one.training * (1 + 1e-12) // one.model.training(tokens))
    if steps < 1:
        raise ConfigError(
            f"{one.training:.3g} FLOPs pay for no step of {tokens:,} tokens with {one.model.name}; "
            "raise --flops, or lower train_batch_size"
        )
    return steps


def _choose(
    base: Base, config: Config, one: Candidate, out: Path, choosing: Choosing
) -> tuple[list[str], list[list[str]]]:
    """Return overrides of the domains, and the commands that make their files."""
    kind = base_method(one.selector)
    flags = _flags(kind, choosing)
    files = ["--config", *base.files]
    files += ["-d", base.conf_dir] if base.conf_dir else []
    for text in base.overrides:
        files += ["--set", text]
    overrides, commands = [], []
    for domain, block in config.domains.items():
        if block.target:
            continue
        if not block.valid:
            raise ConfigError(
                f"domain '{domain}' has no `valid` of its own: its held-out text would be cut from "
                "what is chosen, and no loss could be compared; give it one"
            )
        table = out / "scores" / f"{kind}-{task_name(domain)}.parquet"
        name = f"{task_name(domain)}-{task_name(one.selector)}-p{one.share:.6g}"
        score = ["score", "--method", kind, "--train", domain, *files, *flags]
        commands.append([*score, "--out", str(table)])
        pick = ["select", "--scores", str(table), "--share", f"{one.share:.6g}", *files]
        pick += ["--order", _order(one.selector), "--name", name, "--domain", domain]
        commands.append([*pick, "--out", str(out / "data")])
        prefix = out / "data" / f"{name}_token_document"
        overrides.append(f"domains.{domain}.train={json.dumps(str(prefix))}")
    return overrides, commands


def _flags(kind: str, choosing: Choosing) -> list[str]:
    flags: list[str] = []
    if kind in _TARGETED:
        if not choosing.targets:
            raise ConfigError(f"'{kind}' chooses by a target; give its files (--target)")
        flags += ["--target", *choosing.targets]
    if kind in SCORED_BY_MODELS:
        model = (choosing.scorers or {}).get(kind)
        if model is None:
            raise ConfigError(f"'{kind}' scores by a model; say by which (--scorer {kind}=FOLDER)")
        flags += ["--model", model]
    if kind == "less":
        flags += ["--epochs", str(choosing.checkpoints)]
    return flags


def _order(selector: str) -> str:
    for order in ("low", "mid"):
        if selector.endswith(f"-{order}"):
            return order
    return "top"


def proposals_text(proposals: Sequence[Proposal]) -> str:
    """Return where the proposed runs are, in Markdown."""
    lines = ["", "## Runs", ""]
    lines += [
        f"- {one.config} ({one.steps:,} steps); {one.script} chooses and trains."
        for one in proposals
    ]
    return "\n".join(lines) + "\n"
