"""What import-linter cannot see: imports inside functions, randomness, clocks, state, layout."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from support import architecture
from support.source import ROOT, python_files

RULES = [
    architecture.wrong_imports,
    architecture.upward_imports,
    architecture.global_randomness,
    architecture.clocks,
    architecture.module_state,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule):
    files = python_files("megatron")
    assert len(files) > 20
    found = [
        finding for path in files for finding in rule(path, ast.parse((ROOT / path).read_text()))
    ]
    assert not found, "\n".join(found)


BREAKS = [
    ("wrong_imports", "mixing/odm.py", "def f():\n    import torch"),
    ("wrong_imports", "mixing/odm.py", "import pydantic"),
    ("wrong_imports", "config/load.py", "def f():\n    from torch import nn"),
    ("wrong_imports", "config/load.py", "import importlib\nimportlib.import_module('wandb')"),
    ("wrong_imports", "launch/command.py", "import numpy"),
    ("wrong_imports", "data/loader.py", "import torch"),
    ("wrong_imports", "data/loader.py", "def f():\n    import torch.distributed"),
    ("wrong_imports", "training/loop.py", "from torch import distributed"),
    ("wrong_imports", "model/gpt.py", "def f():\n    import deepspeed.ops"),
    ("wrong_imports", "monitor/wandb.py", "import wandb"),
    ("wrong_imports", "checkpoint/store.py", "def f():\n    import pickle"),
    ("upward_imports", "state.py", "from megatron.registry import Registry"),
    ("upward_imports", "errors.py", "def f():\n    import megatron.state"),
    ("global_randomness", "data/plan.py", "import random\nx = random.random()"),
    ("global_randomness", "data/plan.py", "from random import shuffle"),
    ("global_randomness", "data/plan.py", "import numpy as np\nnp.random.seed(1)"),
    ("global_randomness", "data/plan.py", "import numpy\nx = numpy.random.rand(2)"),
    ("clocks", "mixing/odm.py", "import time\nx = time.time()"),
    ("clocks", "data/plan.py", "from time import monotonic"),
    ("clocks", "data/plan.py", "import datetime\nx = datetime.datetime.now()"),
    ("module_state", "data/plan.py", "cache = {}"),
    ("module_state", "data/plan.py", "_seen: set[int] = set()"),
    ("module_state", "data/plan.py", "def f():\n    global x\n    x = 1"),
]
KEEPS = [
    ("wrong_imports", "data/loader.py", "def f():\n    import torch"),
    ("wrong_imports", "engine/engine.py", "import deepspeed\nimport torch.distributed"),
    (
        "wrong_imports",
        "data/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    ("global_randomness", "data/plan.py", "import random\nx = random.Random(1).random()"),
    ("global_randomness", "data/plan.py", "import numpy as np\nx = np.random.Philox(key=1)"),
    ("clocks", "monitor/throughput.py", "import time\nx = time.monotonic()"),
    ("module_state", "data/plan.py", "_KINDS = {1: 2}\n__all__ = ['f']"),
]


@pytest.mark.parametrize(("rule", "path", "code"), BREAKS)
def test_a_breach_is_found(rule, path, code):
    check = getattr(architecture, rule)
    assert list(check(Path("megatron") / path, ast.parse(code)))


@pytest.mark.parametrize(("rule", "path", "code"), KEEPS)
def test_what_is_allowed_is_not_found(rule, path, code):
    check = getattr(architecture, rule)
    assert not list(check(Path("megatron") / path, ast.parse(code)))


def test_megatron_is_a_namespace_package_of_packages():
    assert not (ROOT / "megatron" / "__init__.py").exists()
    for folder in sorted({ROOT / path.parent for path in python_files("megatron")}):
        if folder != ROOT / "megatron":
            start = folder / "__init__.py"
            assert start.exists(), f"{folder} has no __init__.py"
            assert ast.get_docstring(ast.parse(start.read_text())), f"{start} says nothing"


def test_import_linter_knows_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    packages = {
        f"megatron.{path.parts[1]}" for path in python_files("megatron") if len(path.parts) > 2
    }
    assert set(settings["root_packages"]) >= packages
    contracts = {contract["id"]: contract for contract in settings["contracts"]}
    layered = {name.strip() for layer in contracts["layers"]["layers"] for name in layer.split("|")}
    assert layered == set(settings["root_packages"])
    assert set(contracts["one-deepspeed"]["source_modules"]) == layered - {"megatron.engine"}
