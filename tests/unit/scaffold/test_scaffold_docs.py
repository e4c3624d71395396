"""The documents: what they name is there, and what does not belong in a repository is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.doc_commands import DOCUMENTS, commands
from support.source import ROOT, python_files, tracked_files

TEXTS = [
    path
    for path in tracked_files()
    if path.suffix in {"", ".cfg", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
    and not path.as_posix().startswith(("LICENSE", "tests/data/"))
]


def test_the_readme_has_the_two_commands():
    found = [command.text for command in commands(Path("README.md"))]
    assert "make quickstart" in found
    assert "make test" in found


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_path_in_a_document_exists(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
    for name in re.findall(r"`((?:configs|docs|tests|tools|benchmarks|megatron)/[\w/.-]*)`", text):
        assert (ROOT / name).exists() or (ROOT / f"{name}.yml").exists(), f"{document}: {name}"


def said_by_the_programs() -> str:
    """Return every string in the sources, those that stand side by side put together."""
    found = []
    for path in [*python_files("megatron"), *python_files("deepy.py"), Path("Makefile")]:
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.suffix != ".py":
            found.append(text)
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_messages_in_the_troubleshooting_page_are_those_of_the_programs():
    said = said_by_the_programs()
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 40
    unknown = [message for message in messages if message.strip() not in said]
    assert not unknown, unknown


def test_no_document_is_named_that_is_not_here():
    names = {path.name for path in DOCUMENTS}
    for path in TEXTS:
        for named in re.findall(r"\b[A-Z][A-Z_]+\.md\b", (ROOT / path).read_text()):
            assert named in names, f"{path} names {named}"


# Put together here, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a registry's host": "|".join(
        rf"{name}\.{end}"
        for name, end in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("npmjs", "org"),
            ("debian", "org"),
        )
    ),
    "an issue's number": r"\b[Ii]" + r"ssue #?\d",
    "a folder of one machine": "/" + "work/" + "|/" + "tmp/w/" + r"|\.\./" + "shared/",
    "an unfinished mark": r"\bTO" + r"DO\b|\bFIX" + r"ME\b|\bX" + r"XX\b",
}


@pytest.mark.parametrize("kind", sorted(FORBIDDEN))
def test_nothing_names_what_does_not_belong(kind):
    assert len(TEXTS) > 50
    found = []
    for path in TEXTS:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            if re.search(FORBIDDEN[kind], line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("a registry's host", "from https://" + "pypi." + "org/simple"),
        ("an issue's number", "see iss" + "ue #12"),
        ("a folder of one machine", "open('/wo" + "rk/main')"),
        ("an unfinished mark", "# TO" + "DO later"),
    ],
)
def test_the_patterns_find_what_they_look_for(kind, line):
    assert re.search(FORBIDDEN[kind], line)
