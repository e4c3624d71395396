"""``docs/neox_parity.md``: every key and tool of upstream, and the tests that show what works."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron.config.parity import SYSTEMS, upstream_keys, verdict
from megatron.config.parity_tools import TOOLS, Tool

_TITLES = {
    "online-data-mixing": "The online-data-mixing fork",
    "gpt-neox": "GPT-NeoX (main)",
}
_INTRODUCTION = """\
# Every key and tool of GPT-NeoX

<!-- Written by tools/generate_docs.py from megatron/config; do not edit. -->

What becomes of every configuration key and every tool of GPT-NeoX and of its online-data-mixing
fork. How to come over with configurations, data and checkpoints:
[Coming from GPT-NeoX](coming_from_neox.md).

- **works**: the key has its meaning here. The test that is named fails if it did nothing.
- **mapped**: it is read and becomes what the table says, which the test shows.
- **no effect**: accepted, and listed with its reason when a run starts.
- **refused**: the run stops before it starts and says what to do instead; values that ask for
  nothing are accepted.
"""


def parity_page(root: Path) -> str:
    """Return the page.

    Args:
        root: the repository, whose tests are read (not imported) for their markers.
    """
    shown = marked_tests(root)
    parts = [_INTRODUCTION, *_counts()]
    for system in SYSTEMS:
        parts += ["", f"## {_TITLES[system]}: keys", *_keys(system, shown)]
    for system in SYSTEMS:
        parts += ["", f"## {_TITLES[system]}: tools", *_tools(system, root)]
    return "\n".join(parts) + "\n"


def _counts() -> Iterator[str]:
    yield "| | keys | works | mapped | no effect | refused |"
    yield "|---|---|---|---|---|---|"
    for system, keys in upstream_keys().items():
        count = Counter(verdict(key).state for key in keys)
        states = (count["works"], count["mapped"], count["no effect"], count["refused"])
        yield f"| {_TITLES[system]} | {len(keys)} | {' | '.join(map(str, states))} |"


def _keys(system: str, shown: dict[str, list[str]]) -> Iterator[str]:
    keys = upstream_keys()[system]
    for group in dict.fromkeys(group for group, *_ in keys.values()):
        yield f"\n### {group}\n"
        yield "| key | its default | here | as | shown by |"
        yield "|---|---|---|---|---|"
        for key, (own_group, _, default) in keys.items():
            if own_group != group:
                continue
            found = verdict(key)
            tests = shown.get(key, []) if found.promised else []
            yield (
                f"| `{key}` | {_cell(default)} | {found.state} | {_escape(found.text)} "
                f"| {_link(tests[0]) if tests else ''} |"
            )


def _cell(default: object) -> str:
    return "" if default is None else f"`{_escape(json.dumps(default, ensure_ascii=False))}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _link(test: str) -> str:
    path, name = test.split("::", 1)
    return f"[{name}](../{path})"


def _tools(system: str, root: Path) -> Iterator[str]:
    yield "\n| theirs | here | by | flags |"
    yield "|---|---|---|---|"
    for tool in TOOLS:
        if tool.system == system:
            # In code marks only what is in this repository: the documents' test looks for it.
            by = f"`{tool.ours}`" if tool.ours and (root / tool.ours).is_file() else tool.ours
            by = by or tool.reason
            if tool.ours and tool.reason:
                by += f": {tool.reason}"
            state = tool.state if not tool.ours or by.startswith("`") else "not yet"
            yield f"| {tool.path} | {state} | {_escape(by)} | {_escape(_flags(tool))} |"


def _flags(tool: Tool) -> str:
    texts = []
    for flag, here in tool.flags.items():
        texts.append(f"`{flag}`" if here == flag else f"`{flag}` → {here}")
    return "; ".join(texts)


def marked_tests(root: Path) -> dict[str, list[str]]:
    """Return by key the tests that carry ``pytest.mark.option(key, …)``, as PATH::NAME.

    A mark on a module or a class counts for its first test. Files are parsed, never imported.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(root.glob("tests/**/test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.option(" not in text:
            continue
        name = path.relative_to(root).as_posix()
        for test, keys in _marks(ast.parse(text)):
            for key in keys:
                found.setdefault(key, []).append(f"{name}::{test}")
    return found


def _marks(module: ast.Module) -> Iterator[tuple[str, list[str]]]:
    tests = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    tests = [node for node in tests if node.name.startswith("test_")]
    for test in tests:
        yield test.name, [key for mark in test.decorator_list for key in _keys_in(mark)]
    for node in module.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
        ):
            yield tests[0].name, list(_keys_in(node.value))


def _keys_in(expression: ast.expr) -> Iterator[str]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.option":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value
