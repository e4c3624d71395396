"""The Python in docs/mixing.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mixing.md").read_text(), re.DOTALL)
TRAIN = "train = lambda p: ([20.0, 10.0], [8, 8])\n"
IMPORTS = """
from dataclasses import dataclass, field
import numpy as np
from megatron.mixing.base import Mixer
from megatron.mixing.build import build_mixer, register
from megatron.mixing.observation import Observation
from megatron.mixing.options import CommonOptions
"""
USE = """
mixer = build_mixer("greedy", domains=["a", "b", "c"], share=0.8)
mixer.observe(Observation(1, loss_sum=[1.0, 9.0, 2.0], token_count=[1, 1, 1]))
print(mixer.decide(2).sampling_weights.round(12).tolist())
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_example_of_use():
    assert run(TRAIN + BLOCKS[0] + "print(state['step'])") == "1000"


def test_the_example_of_a_method():
    assert run(IMPORTS + BLOCKS[1] + USE) == "[0.1, 0.8, 0.1]"
