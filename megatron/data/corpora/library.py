"""Texts that every Python installation carries: its source, docstrings, manual and bytecode."""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

from megatron.data.corpora.documents import Document
from megatron.errors import DataError

# Not always installed (test), not the installation's own (site-packages), or tables and not text.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"encodings", "pydoc_data", "lib2to3", "distutils", "ensurepip", "turtledemo"}
)


def source_files() -> list[tuple[str, str]]:
    """Return (name, text) of the standard library's modules, in a fixed shuffled order.

    Raises:
        DataError: the library's source is not on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[str, str]] = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _LEFT_OUT.intersection(name.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            found.append((name.as_posix(), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue
    if not found:
        raise DataError(
            f"no source of the standard library under {root}: quickstart builds its text from "
            "it; use a Python that was installed with its library's source"
        )
    return sorted(found, key=lambda item: hashlib.blake2b(item[0].encode()).digest())


def code() -> Iterator[Document]:
    """Yield the library's modules as code: their docstrings are cut out (see `docstrings`)."""
    for name, text in source_files():
        tree = _parse(text)
        if tree is not None:
            yield Document(text=_without_docstrings(text, tree), source=name)


def docstrings() -> Iterator[Document]:
    """Yield one document per module: the docstrings of its classes and functions.

    Each stands under its name and signature.  Modules written in C are asked at run time.
    """
    for name, text in source_files():
        tree = _parse(text)
        if tree is not None:
            yield from _joined(list(_documented(tree, _module_name(name))), source=name)
    for module in sorted(sys.builtin_module_names):
        if not module.startswith("_frozen"):
            yield from _joined(_builtin_docstrings(module), source=f"built-in {module}")


def manual() -> Iterator[Document]:
    """Yield the language manual's topics, as ``help()`` shows them, and the modules' own texts.

    Raises:
        DataError: this Python was installed without the topics.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python has no documentation topics (module pydoc_data.topics), which "
            "quickstart takes as a domain; use a full installation of Python"
        ) from error
    # Short topics first: a long one quotes them, and the filter keeps what it sees first.
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        for number, section in enumerate(_sections(text)):
            yield Document(text=section, source=f"topic {name} {number}")
    for name, text in source_files():
        tree = _parse(text)
        told = ast.get_docstring(tree) if tree is not None else None
        if told and len(told) >= 300:
            for number, section in enumerate(_sections(f"{_module_name(name)}\n\n{told}")):
                yield Document(text=section, source=f"module {name} {number}")


def bytecode() -> Iterator[Document]:
    """Yield the library's functions as this interpreter's instructions, one module a document."""
    for name, text in source_files():
        try:
            compiled = compile(text, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        lines = [line for unit in _code_objects(compiled) for line in _instructions(unit)]
        # A module with hundreds of functions would be one enormous document.
        for start in range(0, len(lines), 400):
            part = "\n".join(lines[start : start + 400])
            yield Document(text=part + "\n", source=f"{name} {start // 400}")


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _with_docstring(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield node, first


def _without_docstrings(text: str, tree: ast.Module) -> str:
    lines = text.splitlines()
    dropped: set[int] = set()
    for node, expression in _with_docstring(tree):
        start, end = expression.lineno - 1, expression.end_lineno or expression.lineno
        if lines[start][: expression.col_offset].strip():
            continue  # `class A: "text"` on one line: nothing to cut
        dropped.update(range(start, end))
        if len(getattr(node, "body", [])) == 1 and not isinstance(node, ast.Module):
            lines[start] = " " * expression.col_offset + "pass"
            dropped.discard(start)
    return "\n".join(line for index, line in enumerate(lines) if index not in dropped) + "\n"


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    def visit(node: ast.AST, path: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                name = f"{path}.{child.name}"
                yield f"class {name}", ast.get_docstring(child) or ""
                yield from visit(child, name)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path}.{child.name}"
                yield f"{name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""

    yield from visit(tree, module)


def _builtin_docstrings(module: str) -> list[tuple[str, str]]:
    loaded = importlib.import_module(module)
    found = [(module, inspect.getdoc(loaded) or "")]
    for name, value in sorted(vars(loaded).items()):
        if name.startswith("_") or not (inspect.isclass(value) or callable(value)):
            continue
        found.append((f"{module}.{name}", inspect.getdoc(value) or ""))
        if inspect.isclass(value) and value.__module__ in (module, "builtins"):
            found += [
                (f"{module}.{name}.{member}", inspect.getdoc(attribute) or "")
                for member, attribute in sorted(vars(value).items())
                if callable(attribute) and not member.startswith("__")
            ]
    return found


def _joined(entries: list[tuple[str, str]], *, source: str) -> Iterator[Document]:
    told = [f"{name}\n{_indented(text)}" for name, text in entries if len(text) >= 40]
    if told:
        yield Document(text="\n\n".join(told) + "\n", source=source)


def _indented(text: str) -> str:
    # Paragraphs inside one docstring stay together: a blank line ends the entry.
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines() if line.strip())


def _sections(text: str, *, longest: int = 6_000) -> Iterator[str]:
    """Cut a long topic between paragraphs, so that no document is a large part of a split."""
    held: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if held and size + len(paragraph) > longest:
            yield "\n\n".join(held) + "\n"
            held, size = [], 0
        held.append(paragraph)
        size += len(paragraph) + 2
    if held:
        yield "\n\n".join(held) + "\n"


def _code_objects(unit: types.CodeType) -> Iterator[types.CodeType]:
    for constant in unit.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _code_objects(constant)


def _instructions(unit: types.CodeType) -> Iterator[str]:
    arguments = ", ".join(unit.co_varnames[: unit.co_argcount])
    yield f"{unit.co_qualname}({arguments})"
    for step in dis.get_instructions(unit):
        if step.opname not in ("CACHE", "RESUME"):
            mark = ">" if step.is_jump_target else " "
            yield f"{mark}{step.offset:4d} {step.opname} {_shown(step)}".rstrip()
    yield ""


def _shown(step: dis.Instruction) -> str:
    """Show an argument the same way in every process (no addresses, no order of hashing)."""
    value = step.argval
    if isinstance(value, types.CodeType):
        return f"<code {value.co_name}>"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    text = step.argrepr or ("" if step.arg is None else str(step.arg))
    return text.replace("\n", " ")[:80]
