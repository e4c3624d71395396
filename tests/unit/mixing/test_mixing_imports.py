"""The public API in an environment that holds NumPy and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
USE = """
import sys
sys.path[:0] = sys.argv[1:]
from data_sampling_utils import Observation, RunContext, available_methods, build_mixer

import json, pathlib, tempfile
ledger = pathlib.Path(tempfile.mkdtemp()) / "mixture.jsonl"
ledger.write_text(json.dumps({"step": 1, "probability": {"code": 0.5, "prose": 0.5}}) + "\\n")
needed = {
    "ado": {"first_fit": 2},
    "auto": {"count_losses": [1.0, 0.5]},
    "dynamic_loading": {"targets": [1.0, 2.0]},
    "velocitune": {"targets": [1.0, 2.0]},
    "doremi": {"reference": "runs/reference", "context": RunContext(vocab_size=100)},
    "replay": {"ledger": str(ledger)},
    "average_of_ledger": {"ledger": str(ledger)},
}
for method in available_methods():
    options = needed.get(method, {})
    mixer = build_mixer(method, domains=["code", "prose"], weights=[0.5, 0.5], **options)
    for step in range(1, 4):
        p = mixer.decide(step=step).sampling_weights
        mixer.observe(Observation(step=step, loss_sum=[20.0, 5.0], token_count=[8, 4]))
    mixer.load_state_dict(mixer.state_dict())

import importlib.util
for name in ("pydantic", "torch", "yaml", "scipy", "deepspeed"):
    assert name not in sys.modules, name
    assert importlib.util.find_spec(name) is None, f"{name} can be found: not a bare environment"
foreign = {
    name.partition(".")[0]
    for name, module in sys.modules.items()
    if getattr(module, "__file__", None)
} - set(sys.stdlib_module_names)
print(" ".join(sorted(foreign)))
"""


@pytest.fixture
def numpy_alone(tmp_path):
    """A folder that holds NumPy and the shared libraries that it brings."""
    installed = Path(np.__file__).parent
    for name in ("numpy", "numpy.libs"):
        if (installed.parent / name).exists():
            (tmp_path / name).symlink_to(installed.parent / name)
    return tmp_path


def run(*paths):
    command = [sys.executable, "-I", "-S", "-c", USE, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_works_with_numpy_alone(numpy_alone):
    done = run(ROOT, numpy_alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["data_sampling_utils", "megatron", "numpy"]


def test_the_bare_environment_is_bare(tmp_path):
    """Without NumPy in it the same command fails, so the test above tests what it says."""
    done = run(ROOT, tmp_path)
    assert done.returncode != 0
    assert "No module named 'numpy'" in done.stderr


def test_no_module_of_the_package_imports_anything_else():
    """Also inside functions: what is imported is NumPy, the standard library or lower layers."""
    allowed = {"numpy", *sys.stdlib_module_names}
    lower = ("megatron.errors", "megatron.registry", "megatron.state", "megatron.mixing")
    files = sorted((ROOT / "megatron" / "mixing").glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.partition(".")[0] in allowed or name.startswith(lower), (file, name)
