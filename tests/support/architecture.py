"""The rules of the house that import-linter cannot see, each a function from source to findings."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Who may import a library at all, by package of megatron/ ("" is a file directly in it).
ALLOWED_IN = {
    "torch": {
        *("parallel", "model", "engine", "signals", "checkpoint", "training", "inference"),
        *("data", "monitor", "exchange", "selection"),
    },
    "torch.distributed": {"parallel", "engine", "signals", "checkpoint"},
    "deepspeed": {"engine"},
    "wandb": {"monitor"},
    "comet_ml": {"monitor"},
    "transformers": {"tokenizer", "exchange", "inference"},
    "sklearn": {"experiments", "selection"},
}
# Who may import torch when the module itself is imported, and not only inside a function.
TORCH_AT_TOP = {
    *("parallel", "model", "engine", "signals", "checkpoint", "training", "inference"),
    *("exchange", "selection"),
}
# Modules about one optional library, which are themselves imported where they are needed.
ABOUT = {
    "megatron/monitor/live.py": "rich",
    "megatron/inference/harness.py": "lm_eval",
    "megatron/selection/bm25_index.py": "bm25s",
}
LIGHT = {"numpy", "pydantic", "pydantic_core", "yaml", "typing_extensions"}
MIXING_MAY = {"numpy", "scipy"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
LOCAL_RANDOM = {"Random", "SystemRandom"}
LOCAL_NUMPY_RANDOM = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}
# Lends the process's generators to lm-eval, and puts them back.
LENDS_GENERATORS = "inference/task_seeds.py"
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
# Decisions are made here; elsewhere a clock only measures.
NO_CLOCK = {"config", "data", "mixing", "model", "parallel", "signals"}
CLOCK_TELLS_PROGRESS = ("megatron/data/ingest/", "megatron/data/corpora/")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement's target."""

    name: str
    line: int
    at_top: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """Yield every import of a module, also those inside functions and by ``import_module``."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = at_top and not isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = False
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name=alias.name, line=child.lineno, at_top=at_top)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    yield Import(name=name, line=child.lineno, at_top=at_top)
            elif isinstance(child, ast.Call) and (name := _dynamic(child)):
                yield Import(name=name, line=child.lineno, at_top=at_top)
            yield from visit(child, inside)

    yield from visit(tree, True)


def _dynamic(call: ast.Call) -> str:
    """Return what ``import_module("name")`` or ``__import__("name")`` imports."""
    by_name = ast.unparse(call.func).endswith(("import_module", "__import__"))
    if by_name and call.args and isinstance(call.args[0], ast.Constant):
        return str(call.args[0].value)
    return ""


def _under(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


def package(path: Path) -> str:
    """Return the sub-package of megatron/ that ``path`` belongs to, "" for a file in it."""
    return path.parts[1] if len(path.parts) > 2 else ""


def wrong_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Find libraries imported where they may not be, also inside functions."""
    where = package(path)
    for found in imports(tree):
        for library, allowed in ALLOWED_IN.items():
            if _under(found.name, library) and where not in allowed:
                yield f"{path}:{found.line} imports {found.name}; {library} is for {allowed}"
        first = found.name.partition(".")[0]
        own = first in sys.stdlib_module_names or first == "megatron"
        if where == "mixing" and not own and first not in MIXING_MAY:
            yield f"{path}:{found.line} imports {found.name}; mixing has NumPy alone"
        if where == "launch" and not own:
            yield f"{path}:{found.line} imports {found.name}; launch has the library alone"
        if found.at_top and not own and first not in LIGHT:
            expected = (
                (first == "torch" and where in TORCH_AT_TOP)
                or (first == "deepspeed" and where == "engine")
                or ABOUT.get(path.as_posix()) == first
            )
            if expected:
                continue
            yield f"{path}:{found.line} imports {found.name} at the top; do so where it is used"
        if found.at_top and found.name.rpartition(".")[0].replace(".", "/") + ".py" in ABOUT:
            yield f"{path}:{found.line} imports {found.name} at the top; do so where it is used"
        if first in PICKLES:
            yield f"{path}:{found.line} imports {found.name}; no pickle of our own"


def upward_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Find imports by the files directly in megatron/, which stand below every package."""
    if package(path):
        return
    allowed = set() if path.stem == "errors" else {"errors"}
    for found in imports(tree):
        parts = found.name.split(".")
        if parts[0] == "megatron" and parts[1] not in allowed:
            yield f"{path}:{found.line} imports {found.name}"


def _attribute(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ""


def global_randomness(path: Path, tree: ast.Module) -> Iterator[str]:
    """Find draws from, and seeds of, the process's own generators."""
    if path.as_posix().endswith(LENDS_GENERATORS):
        return
    for node in ast.walk(tree):
        name = _attribute(node)
        for prefixes, local in (
            (("random.",), LOCAL_RANDOM),
            (("np.random.", "numpy.random."), LOCAL_NUMPY_RANDOM),
        ):
            for prefix in prefixes:
                member = name.removeprefix(prefix)
                first = member.partition(".")[0].partition("(")[0]
                if name.startswith(prefix) and first not in local:
                    yield f"{path}:{node.lineno} uses {name}"  # type: ignore[attr-defined]
    for found in imports(tree):
        module, _, member = found.name.rpartition(".")
        if module == "random" and member not in LOCAL_RANDOM:
            yield f"{path}:{found.line} imports {found.name}"
        if module == "numpy.random" and member not in LOCAL_NUMPY_RANDOM:
            yield f"{path}:{found.line} imports {found.name}"


def clocks(path: Path, tree: ast.Module) -> Iterator[str]:
    """Find clocks read where decisions are made."""
    if package(path) not in NO_CLOCK or path.as_posix().startswith(CLOCK_TELLS_PROGRESS):
        return
    for node in ast.walk(tree):
        name = _attribute(node)
        module, _, member = name.rpartition(".")
        if (module == "time" and member in CLOCKS) or (
            module.endswith(("datetime", "date")) and member in ("now", "utcnow", "today")
        ):
            yield f"{path}:{node.lineno} reads {name}"  # type: ignore[attr-defined]
    for found in imports(tree):
        module, _, member = found.name.rpartition(".")
        if module == "time" and member in CLOCKS:
            yield f"{path}:{found.line} imports {found.name}"


def module_state(path: Path, tree: ast.Module) -> Iterator[str]:
    """Find ``global`` statements, and module-level variables made to be changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{path}:{node.lineno} changes the module's {', '.join(node.names)}"
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        value = getattr(node, "value", None)
        made = isinstance(value, ast.List | ast.Dict | ast.Set) or (
            isinstance(value, ast.Call)
            and ast.unparse(value.func).rpartition(".")[2]
            in ("list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter")
        )
        for target in targets:
            name = target.id if isinstance(target, ast.Name) else ""
            if made and name and name != name.upper() and not name.startswith("__"):
                yield f"{path}:{node.lineno} keeps state in {name}"
