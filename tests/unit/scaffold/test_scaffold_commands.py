"""Commands in the documents: each is known to the tests, and is what its program takes.

What each kind of command is put to stands in ``support/documented.py``; those that are really run
are run by ``tests/e2e/test_documented_commands.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.doc_commands import DOCUMENTS, Command, block_commands, commands, stray_commands
from support.documented import LEFT_BEHIND, WAYS, output_flags, outputs, way_of
from support.own_names import own_names_only  # noqa: F401 (for every test here)
from support.source import ROOT
from support.tiny_project import environment, make_project

import deepy
from megatron.config import load_config

ALL = [command for document in DOCUMENTS for command in commands(document)]


def put_to(quick: str) -> list[Command]:
    return [command for command in ALL if (way := way_of(command)) and way.quick == quick]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def inside(project, monkeypatch) -> Path:
    """The project as working folder, on the CPU, with a disk that is large enough."""
    monkeypatch.chdir(project)
    for name, value in environment(project).items():
        monkeypatch.setenv(name, value)
    plenty = SimpleNamespace(total=2**50, used=0, free=2**50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    return project


def test_documents_have_commands():
    assert len(ALL) > 60
    assert {command.document.name for command in ALL} >= {"README.md", "getting_started.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_stand_in_shell_blocks(document):
    stray = stray_commands(document)
    assert not stray, "mark these blocks as ```bash, so that they are tested:\n" + "\n".join(stray)


def test_it_is_decided_how_each_command_is_tested():
    open_ones = [str(command) for command in ALL if way_of(command) is None]
    assert not open_ones, "add a row to tests/support/documented.py for\n" + "\n".join(open_ones)


def test_exceptions_have_a_reason_and_are_needed():
    for way in WAYS:
        assert (way.slow or way.quick == "run") is not bool(way.why), way.pattern
        if way.why:
            assert any(way_of(command) is way for command in ALL), f"no command is {way.pattern}"


def test_a_new_command_is_noticed():
    new = block_commands("curl https://example.org/x | sh\npython tools/new.py && ./other --now\n")
    assert [way_of(command) for command in new] == [None, None, None, None]


@pytest.mark.parametrize("text", ["cd /x", "x=$(pwd)", "if true; then ls; fi", "make … | x"])
def test_what_is_too_much_of_a_script_is_refused(text):
    with pytest.raises(ValueError, match="too much of a shell script"):
        block_commands(text)


def test_loops_variables_and_redirections_are_understood():
    text = "for x in a b; do\n  X=1 python t.py --in $x.txt \\\n   --n 1 > ${x}.out  # why\ndone"
    found = block_commands(text)
    assert [command.words for command in found] == [
        ("python", "t.py", "--in", "a.txt", "--n", "1"),
        ("python", "t.py", "--in", "b.txt", "--n", "1"),
    ]
    assert [command.makes for command in found] == [("a.out",), ("b.out",)]


@pytest.mark.parametrize("command", put_to("make"), ids=str)
def test_make_has_the_target(command):
    done = subprocess.run(
        [*command.words, "--dry-run", "VENV=/nowhere/venv"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", put_to("run"), ids=str)
def test_it_runs_as_it_stands(command, inside, capsys):
    program = Path(command.words[0] if command.words[0] != "python" else command.words[1]).stem
    words = list(command.words[1 + (command.words[0] == "python") :])
    main = deepy.main if program == "deepy" else __import__(program).main
    code = main(words)
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    assert len(shown.out) > 100
    for name in command.makes:
        (inside / name).write_text(shown.out)


@pytest.mark.parametrize("command", put_to("check"), ids=str)
def test_the_check_of_the_run_passes(command, inside, monkeypatch, capsys):
    if re.search(r"\bload: (\S+)", _file_texts(command)) or "doremi" in command.text:
        # These begin with the weights of an earlier run, which only the slow tests have.
        words = ["--print-config", *command.words[1:]]
    else:
        words = ["--check", *command.words[1:]]
    assert deepy.main(words) == 0, capsys.readouterr().err
    parsed(command)


@pytest.mark.parametrize("command", put_to("config"), ids=str)
def test_its_configuration_is_read(command, inside, capsys):
    assert deepy.main(["--print-config", *command.words[1:]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", put_to("dry-run"), ids=str)
def test_the_study_can_be_planned(command, inside, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    import mix

    words = list(command.words[2:])
    code = mix.main(words if "--dry-run" in words else [*words, "--dry-run"])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    assert "FLOP" in shown.out


@pytest.mark.parametrize("command", put_to("parse"), ids=str)
def test_the_program_takes_these_words_and_the_files_are_there(command, inside):
    parsed(command)
    made = {*LEFT_BEHIND, *made_before(command)}
    for name in read_by(command):
        there = glob.glob(name) or glob.glob(f"{name}.idx") or name.startswith(tuple(made))
        assert there or _is_configuration(name, command), f"{command}: who makes {name}?"


@pytest.mark.parametrize(
    "words",
    ["python tools/report.py runs/quickstart --no-such-flag", "python tools/report.py -o x.html"],
)
def test_words_that_a_program_does_not_take_are_noticed(words, inside):
    (command,) = block_commands(words)
    with pytest.raises(AssertionError, match=r"usage: tools/report\.py"):
        parsed(command)


class Parsed(Exception):
    """The program's parser has accepted the words."""


def parsed(command: Command) -> None:
    """Run the program up to where its arguments are parsed."""
    words = [word for word in command.words if word != "python"]
    script = ROOT / words[0].removeprefix("./")
    messages = io.StringIO()
    with stopping_parser(), contextlib.redirect_stderr(messages):
        before, path = sys.argv, list(sys.path)
        sys.argv = words
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit:
            pass
        finally:
            sys.argv, sys.path[:] = before, path
    raise AssertionError(f"{command}\n{messages.getvalue()}")


@contextlib.contextmanager
def stopping_parser() -> Iterator[None]:
    """Let argparse end the program once it has accepted the command line."""
    names = ("parse_args", "parse_intermixed_args")
    originals = {name: getattr(argparse.ArgumentParser, name) for name in names}

    def stopping(name):
        def parse(self, args=None, namespace=None):
            originals[name](self, args, namespace)
            raise Parsed

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        yield


def read_by(command: Command) -> list[str]:
    """Return the words of a command that name what it reads."""
    words = [word for word in command.words if word != "python"][1:]
    found = []
    for place, word in enumerate(words):
        written = place > 0 and words[place - 1] in (*output_flags(command), "--shard")
        if not written and re.fullmatch(r"[\w.*-]*(/[\w.*-]*)+|[\w-]+\.(json|jsonl|yml|pt)", word):
            found.append(word)
    return found


def made_before(command: Command) -> set[str]:
    """Return what the earlier commands of the page write."""
    made: set[str] = set()
    for earlier in commands(command.document):
        if earlier == command:
            break
        words = earlier.words
        made |= set(outputs(earlier))
        if words[0] == "./deepy.py" and "train.py" in words:
            arguments = deepy.parse_arguments(list(words[1:]))
            with contextlib.suppress(Exception):
                made.add(
                    load_config(
                        arguments.conf_file,
                        conf_dir=arguments.conf_dir,
                        overrides=arguments.overrides,
                    ).checkpoint.run_dir
                )
        if "tools/mix.py" in words:
            made.add(f"runs/studies/{words[2]}")
        if words[:2] == ("python", "prepare_data.py") and "mixbench" in words:
            made.add("data/mixbench")
    return made


def _is_configuration(name: str, command: Command) -> bool:
    folder = command.words[command.words.index("-d") + 1] if "-d" in command.words else "."
    return Path(folder, f"{name}.yml").exists() or Path(folder, name).exists()


def _file_texts(command: Command) -> str:
    arguments = deepy.parse_arguments(list(command.words[1:]))
    folder = Path(arguments.conf_dir or ".")
    return "".join((folder / f"{name}.yml").read_text() for name in arguments.conf_file)
