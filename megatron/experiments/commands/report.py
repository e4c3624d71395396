"""Make the report of a study again from the files in its folder.

  tools/mix.py report runs/studies/sweep

Every other command writes report.html when it ends.  Made again, it shows what has come since:
the law that was fitted to a sweep, the reports of single runs beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.experiments.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="--out of another command")


def run(options: argparse.Namespace) -> int:
    """Write the report; return the exit code."""
    print(write_report(options.study))
    return 0
