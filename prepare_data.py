#!/usr/bin/env python
"""Make a corpus ready to train on: ``prepare_data.py quickstart`` or a public corpus by name."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do what it asks."""
    options = _parser().parse_args(arguments)
    from megatron.data.corpora.hub import Limits
    from megatron.data.corpora.prepare import Request, prepare
    from megatron.data.corpora.public import CORPORA

    if options.list:
        print("quickstart        seven domains made on this machine, without a network")
        print("mixbench          families of domains to compare methods on, made likewise")
        for corpus in CORPORA.values():
            print(f"{corpus.name:<17} {corpus.about}")
        return 0
    request = Request(
        name=options.dataset,
        data_dir=options.data_dir,
        tokenizer=options.tokenizer,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        source=options.source,
        limits=Limits(documents=options.max_documents, bytes=options.max_bytes),
        workers=options.workers,
        families=tuple(options.families or ()),
    )
    prepare(request, say=lambda line: print(line, flush=True))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("dataset", nargs="?", default="enron", help="its name (default: enron)")
    parser.add_argument("-t", "--tokenizer", default="GPT2BPETokenizer", metavar="TYPE")
    parser.add_argument(
        "-d",
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", "data")),
        help="where corpora are kept (default: DATA_DIR from the environment, or ./data)",
    )
    parser.add_argument("-v", "--vocab-file", type=Path, help="GPT-2's is fetched if not given")
    parser.add_argument("-m", "--merge-file", type=Path, help="GPT-2's is fetched if not given")
    parser.add_argument("--source", help="take the corpus from this address, hub name or folder")
    parser.add_argument("--max-documents", type=_count, help="of each domain; hub corpora only")
    parser.add_argument("--max-bytes", type=_size, help="of each domain's text: 500M, 2G")
    parser.add_argument("--workers", type=_count, default=1, help="processes that tokenise")
    parser.add_argument(
        "--families", nargs="+", metavar="NAME", help="mixbench only: which (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="list the corpora and stop")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 800k, 500M or 2G")
    power = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}[match[2].lower()]
    return int(float(match[1]) * 1000**power)


if __name__ == "__main__":
    sys.exit(run_command(main))
