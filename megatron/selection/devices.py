"""Where a model runs, and in which number format."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.errors import ConfigError, RunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by the names that they have in configurations."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` takes a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    there = torch.cuda.is_available()
    if not there:
        # What reads our checkpoints looks for a GPU too, and would complain of finding none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not there:
        raise ConfigError(f"--device {name}: torch sees no GPU here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


@contextmanager
def enough_memory() -> Iterator[None]:
    """Say which flag helps where a device runs out of memory.

    Raises:
        RunError: it has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"the device has no memory for one pass of the model ({reason}); give a smaller "
            "--batch-tokens, or --dtype bf16; the same command goes on where this one stopped"
        ) from error


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every method that runs a model has."""
    parser.add_argument("--device", default="auto", metavar="NAME",
        help="auto (a GPU if there is one), cpu, cuda or cuda:1 (default: auto)")  # fmt: skip
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES),
        help="number format of the model's weights (default: fp32)")  # fmt: skip
