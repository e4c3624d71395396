"""``deepy.py --plan``: what a configuration would need, on any number of ranks."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Protocol

from megatron.config import Config
from megatron.training.domains import open_run_domains
from megatron.training.layout import run_layout
from megatron.training.plan.assumptions import GIB, Assumptions
from megatron.training.plan.compute import make_plan
from megatron.training.plan.report import report
from megatron.training.summary import complete, tokenizer_vocabulary


class Launched(Protocol):
    """A launch, as far as a plan cares (``megatron.launch.command.LaunchPlan``)."""

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs of this node; 0 means a CPU run."""
        ...


def plan(
    config: Config,
    arguments: Namespace,
    *,
    launched: Callable[[], Launched],
    say: Callable[[str], None] = print,
) -> int:
    """Plan a configuration and report.

    Args:
        config: the loaded configuration.
        arguments: with the flags that ``deepy.py`` lists in PLAN_FLAGS; None where not given.
        launched: returns what a launch from here would start; asked only if no number of
            ranks is given.
        say: takes the lines of the report.

    Returns:
        0; a plan that does not fit is a warning, because numbers are all that was asked for.

    Raises:
        NeomixError: batch, layout or model cannot be so, or the vocabulary's size is not known.
    """
    on_cpu, world_size = False, arguments.world_size
    if world_size is None:
        launch = launched()
        world_size, on_cpu = launch.ranks, launch.gpus == 0
    layout = run_layout(config, world_size)
    chosen = assumptions(config, arguments, world_size=world_size, on_cpu=on_cpu)
    made = make_plan(with_vocabulary(config), layout, on_cpu=on_cpu)
    for line in report(made, chosen):
        say(line)
    return 0


def assumptions(
    config: Config, arguments: Namespace, *, world_size: int, on_cpu: bool
) -> Assumptions:
    """Return what the flags say, else the configuration, else the defaults.

    On a CPU ranks share the machine's memory, and no peak is taken for granted.

    Raises:
        ConfigError: a number that cannot be.
    """
    memory = Assumptions.device_memory
    peak = config.logging.peak_theoretical_tflops
    if on_cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world_size
    given = {
        "device_memory": _times(arguments.device_memory, GIB),
        "peak_flops": _times(
            arguments.peak_tflops if arguments.peak_tflops is not None else peak, 1e12
        ),
        "utilisation": arguments.utilisation,
        "tokens": arguments.tokens,
        "ranks_per_node": arguments.ranks_per_node
        if arguments.ranks_per_node is not None
        else config.launch.num_gpus,
        "bandwidth": _times(arguments.bandwidth, 1e9),
    }
    default = {"device_memory": memory, "on_cpu": on_cpu} | ({"peak_flops": None} if on_cpu else {})
    return Assumptions(**{**default, **{k: v for k, v in given.items() if v is not None}})


def with_vocabulary(config: Config) -> Config:
    """Fill in ``model.vocab_size``; the data is opened only if nothing else says it."""
    size = config.model.vocab_size or tokenizer_vocabulary(config.tokenizer)
    if size is not None:
        model = config.model.model_copy(update={"vocab_size": size})
        return config.model_copy(update={"model": model})
    domains = open_run_domains(config)
    try:
        return complete(config, domains)
    finally:
        domains.close()


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
