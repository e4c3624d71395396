"""What Slurm says of the job that this process is part of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The nodes of a Slurm job.

    Attributes:
        hosts: names of the nodes, in Slurm's order.
        gpus: GPUs of each node; ``None`` if Slurm does not say.
    """

    hosts: tuple[str, ...]
    gpus: int | None


def read_allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Return the allocation that the environment tells of; ``None`` outside of one."""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes or not environ.get("SLURM_JOB_ID"):
        return None
    return Allocation(hosts=tuple(expand_nodes(nodes)), gpus=_gpus(environ))


def started_by_srun(environ: Mapping[str, str]) -> int:
    """Return how many tasks the ``srun`` has that started this process; 1 without one."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdigit() and environ.get("SLURM_STEP_ID") else 1


def expand_nodes(text: str) -> list[str]:
    """Return the names in Slurm's short form: ``a[01-03,7],b`` is a01, a02, a03, a7 and b.

    Raises:
        ConfigError: the form is another.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        pieces = re.findall(r"\[([^\]]*)\]|([^\[\]]+)", part)
        choices = [_numbers(inside, text) if inside else [plain] for inside, plain in pieces]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    if not names:
        raise _malformed(text)
    return names


def _numbers(inside: str, text: str) -> list[str]:
    found: list[str] = []
    for word in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None:
            raise ConfigError(
                f"{text!r} is no list of Slurm nodes; it should be like 'node[01-04]'"
            )
        first, last = match.group(1), match.group(2) or match.group(1)
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return found


def _malformed(text: str) -> ConfigError:
    return ConfigError(f"{text!r} is no list of Slurm nodes; it should be like 'node[01-04]'")


def _gpus(environ: Mapping[str, str]) -> int | None:
    """Read forms such as ``4``, ``h100:4`` and ``h100:2,a100:2``."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        counts = [word.rpartition(":")[2] for word in environ.get(name, "").split(",")]
        if all(count.isdigit() for count in counts) and sum(map(int, counts)) > 0:
            return sum(map(int, counts))
    return None
