#!/usr/bin/env python3
r"""Join tokenised datasets into one, in the order given.

python tools/merge_datasets.py --input FOLDER --output-prefix data/all
python tools/merge_datasets.py --input data/a_text_document data/b_text_document \
    --output-prefix data/all
python tools/merge_datasets.py --shards data/code
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.ingest.merging import find_prefixes, merge_datasets
from megatron.data.ingest.shard_merging import merge_shards
from megatron.data.reader import TokenReader
from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", nargs="+", action="extend", metavar="FOLDER|PREFIX",
        help="a folder, meaning all datasets in it by name, or prefixes; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output-prefix", metavar="PREFIX", help="without suffix")
    parser.add_argument(
        "--shards", metavar="PREFIX",
        help="instead of both: join what preprocess_data.py --shard has written for this "
        "--output-prefix, into the files that it writes without --shard",
    )  # fmt: skip
    parser.add_argument(
        "--labels", action="store_true",
        help="of a folder, join the labels (…label_document), in the order of the tokens, which "
        "are joined without it",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what the prefix holds")
    found = parser.parse_args(arguments)
    if found.shards is not None:
        if found.input or found.output_prefix or found.labels:
            parser.error("--shards names what is joined and where to: give it without the others")
        merge_shards(found.shards, print, overwrite=found.overwrite)
        return 0
    if not found.input or not found.output_prefix:
        parser.error("give --input and --output-prefix, or --shards")
    prefixes: list[str] = []
    for given in found.input:
        prefixes.extend(
            find_prefixes(given, labels=found.labels) if Path(given).is_dir() else [given]
        )
    for note in merge_datasets(prefixes, found.output_prefix, overwrite=found.overwrite):
        print(f"note: {note}")
    with TokenReader(found.output_prefix) as merged:
        print(
            f"{found.output_prefix}.bin: {len(prefixes)} datasets, {merged.num_documents:,} "
            f"documents, {merged.num_tokens:,} tokens ({merged.dtype.name})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
