"""How a command ends with what a user can cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_reader_that_goes_away_is_no_error():
    program = (
        "import sys; from megatron.errors import run_command\n"
        "sys.exit(run_command(lambda: [print('line') for _ in range(100_000)] and 0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout.readline() == "line\n"
        command.stdout.close()
        said = command.stderr.read()
        assert command.wait(timeout=60) == 141
    assert said == ""
