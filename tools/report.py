"""Write the report of one or several runs: ``tools/report.py RUN [RUN …] [-o FILE]``.

The result is one HTML file that needs no network and can be mailed.  With several
runs it overlays them and compares them at equal tokens.  ``docs/report.md`` says
what it shows and describes the files it reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(
        prog="tools/report.py",
        description="Write a self-contained HTML report of one or several runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (run_dir)")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write (default: report.html in the first)"
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="the run that the others are compared with (default: the first static one)",
    )
    parser.add_argument(
        "--words",
        action="store_true",
        help="also print what the report says in words: the comparison, every run, its cost",
    )
    options = parser.parse_args(arguments)
    from megatron.monitor.report import words, write_report

    if options.words:
        print(words(options.runs, options.baseline), end="\n\n")
    print(write_report(options.runs, options.output, options.baseline))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
