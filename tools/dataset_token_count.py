#!/usr/bin/env python3
"""Count the tokens of datasets, to set batch sizes, steps and weights.

python tools/dataset_token_count.py data/code_text_document data/web_text_document
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.reader import TokenReader
from megatron.errors import run_command

_BLOCK = 1 << 22


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="datasets, without suffix")
    parser.add_argument(
        "--labels", action="store_true",
        help="the datasets are labels: count those that are trained on, too (reads the files)",
    )  # fmt: skip
    found = parser.parse_args(arguments)
    total = 0
    for given in found.prefixes:
        prefix = given.removesuffix(".bin").removesuffix(".idx")
        with TokenReader(prefix) as reader:
            total += reader.num_tokens
            line = f"{prefix}: {reader.num_tokens:,} tokens in {reader.num_documents:,} documents"
            if found.labels:
                line += f", {_trained(reader):,} trained on"
            print(f"{line} ({reader.dtype.name})")
    if len(found.prefixes) > 1:
        print(f"total: {total:,} tokens")
    return 0


def _trained(reader: TokenReader) -> int:
    return sum(
        int((reader.read(start, min(start + _BLOCK, reader.num_tokens)) >= 0).sum())
        for start in range(0, reader.num_tokens, _BLOCK)
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
