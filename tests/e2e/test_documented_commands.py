"""Commands of the documents, typed as they stand into a tiny project, page by page."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.doc_commands import DOCUMENTS, Command, commands
from support.documented import outputs, way_of
from support.tiny_project import environment, make_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def really_run(document: Path) -> list[Command]:
    return [command for command in commands(document) if (way := way_of(command)) and way.slow]


def in_shell(shown: str, root: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shown],
        cwd=root,
        env=environment(root),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{shown}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project in which the quickstart has been done."""
    root = make_project(tmp_path_factory.mktemp("project"))
    in_shell("./deepy.py train.py -d configs local/quickstart mixing/odm", root)
    return root


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if really_run(path)], ids=str)
def test_the_commands_of_a_page_run(document, project, tmp_path):
    page = tmp_path / "page"
    shutil.copytree(project, page, symlinks=True)
    for command in really_run(document):
        for made in outputs(command):
            for path in page.glob(f"{made}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    done: set[str] = set()
    for command in really_run(document):
        if command.shown not in done:
            in_shell(command.shown, page)
        done.add(command.shown)
        for name in outputs(command):
            assert [*page.glob(f"{name}*")], f"{command} left no {name}"
