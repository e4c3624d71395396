"""The documents: what they name is there, and what does not belong in a repository is not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from support.source import ROOT, tracked_files

import deepy
import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
from megatron.config import load_config

DOCUMENTS = [path for path in tracked_files() if path.suffix == ".md"]
TEXTS = [
    path
    for path in tracked_files()
    if path.suffix in {"", ".cfg", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
    and not path.as_posix().startswith(("LICENSE", "tests/data/"))
]


def commands(text: str) -> list[list[str]]:
    """Return the commands of the shell blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_has_the_two_commands():
    found = [" ".join(words) for words in commands((ROOT / "README.md").read_text())]
    assert "make quickstart" in found
    assert "make test" in found


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_make_target_in_a_document_exists(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in commands((ROOT / document).read_text()):
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets, f"{document}: {' '.join(words)}"


def scripts() -> list[tuple[str, tuple[str, ...]]]:
    """Return (script, long flags) of the commands in the documents."""
    found = set()
    for document in DOCUMENTS:
        for words in commands((ROOT / document).read_text()):
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if not words or not words[-1]:
                continue
            own = [word for word in words if word.endswith(".py")]
            if own:
                flags = {word.partition("=")[0] for word in words if word.startswith("--")}
                found.add((own[0].removeprefix("./"), tuple(sorted(flags))))
    return sorted(found)


@pytest.mark.parametrize(("script", "flags"), scripts())
def test_every_script_and_flag_in_a_document_exists(script, flags):
    assert (ROOT / script).exists(), script
    if flags:
        shown = subprocess.run(
            [sys.executable, script, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert shown.returncode == 0, shown.stderr
        for flag in flags:
            assert flag in shown.stdout, f"{script} has no {flag}"


def deepy_commands() -> list[list[str]]:
    return [
        words[1:]
        for document in DOCUMENTS
        for words in commands((ROOT / document).read_text())
        if words[0] == "./deepy.py" and "train.py" in words and "-d" in words
    ]


@pytest.mark.parametrize("arguments", deepy_commands(), ids=" ".join)
def test_every_run_in_a_document_has_a_configuration_that_is_read(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = deepy.parse_arguments(arguments)
    load_config(parsed.conf_file, conf_dir=parsed.conf_dir, overrides=parsed.overrides)


def test_some_runs_are_documented():
    assert len(deepy_commands()) >= 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_path_in_a_document_exists(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
    for name in re.findall(r"`((?:configs|docs|tests|tools|benchmarks|megatron)/[\w/.-]*)`", text):
        assert (ROOT / name).exists() or (ROOT / f"{name}.yml").exists(), f"{document}: {name}"


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
