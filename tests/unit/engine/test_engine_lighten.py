"""What a process leaves out: DeepSpeed's use of a compiler, pages given back after every step."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
from support.runs import ROOT, environment


def _ask(program: str, **variables: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu", **variables),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_deepspeed_takes_our_optimizers_without_loading_a_compiler():
    found = _ask("""
import json, sys, deepspeed, torch
from deepspeed.runtime import compiler
from megatron.engine.lighten import import_muon_uncompiled
before = compiler.compile
import_muon_uncompiled()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(json.dumps([
    compiler.compile is before,
    issubclass(MuonWithAuxAdam, torch.optim.Optimizer),
    "torch._inductor.compile_fx" in sys.modules,
]))
""")
    assert found == [True, True, False]


FAULTS = """
import json, resource, sys, torch
from megatron.engine.lighten import keep_freed_memory
keep_freed_memory()
def step():
    parts = [torch.ones(1 << 20) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_freed_memory_is_used_again_unless_the_user_has_chosen():
    pages = 10 * 8 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert _ask(FAULTS) < pages / 100
    assert _ask(FAULTS, MALLOC_MMAP_THRESHOLD_="131072") > pages / 100
