"""What this machine offers to a run, found out without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that ranks may use.

    Attributes:
        cuda: ids of the visible CUDA devices (numbers, or UUIDs if the environment names
            them so); empty on a machine that runs on its CPU.
        cores: CPU cores that this process may use.
    """

    cuda: tuple[str, ...]
    cores: int


def detect_devices(environ: Mapping[str, str]) -> Devices:
    """Look for CUDA devices and CPU cores.

    ``CUDA_VISIBLE_DEVICES`` decides if it is set (empty or -1: none); otherwise the
    driver is asked.  A torch without CUDA, or ``DS_ACCELERATOR=cpu``, means none.
    """
    return Devices(cuda=_cuda_devices(environ), cores=usable_cores())


def cuda_possible(environ: Mapping[str, str]) -> bool:
    """Tell whether hosts set up like this one, but with GPUs, would use them."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    switched_off = visible is not None and visible.strip() in ("", "-1")
    return environ.get("DS_ACCELERATOR") != "cpu" and not switched_off and _torch_has_cuda()


def usable_cores() -> int:
    """Return the CPU cores this process may use: its affinity, or a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = count or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def _cuda_devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    if environ.get("DS_ACCELERATOR") == "cpu" or not _torch_has_cuda():
        return ()
    present = _present_devices()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    chosen: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        # CUDA stops reading at the first name that means nothing to it.
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= len(present)):
            break
        chosen.append(name)
    return tuple(chosen)


def _torch_has_cuda() -> bool:
    """Tell whether the installed torch was built with CUDA or ROCm (its version file says so)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(r"^(cuda|hip)\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None


def _present_devices() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is not None:
        try:
            listing = subprocess.run(
                [command, "-L"], capture_output=True, text=True, timeout=30, check=True
            ).stdout
            return tuple(re.findall(r"^GPU (\d+):", listing, re.MULTILINE))
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return tuple(str(i) for i in range(len(os.listdir("/proc/driver/nvidia/gpus"))))
    except OSError:
        return ()
