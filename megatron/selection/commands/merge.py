"""Join what all shards of a scoring have written into one table.

tools/select_data.py merge --out scores/ppl.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.selection.commands.score import summary
from megatron.selection.commands.shared import parser_of


def make_parser(prog: str, words: list[str]) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = parser_of(prog, __doc__)
    parser.add_argument(
        "--out", required=True, metavar="FILE.parquet", help="as it was given to the shards"
    )
    parser.add_argument("--work-dir", metavar="DIR", help="as it was given to the shards")
    return parser


def run(options: argparse.Namespace) -> int:
    """Merge, and say what came of it."""
    from megatron.selection.merging import merge

    out = Path(options.out)
    facts = merge(out, None if options.work_dir is None else Path(options.work_dir))
    print(summary(out, facts))
    return 0
