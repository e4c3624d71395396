#!/usr/bin/env python3
"""Train a byte-level BPE tokenizer.json on the formats that preprocess_data.py reads.

python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.json --vocab-size 32000
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.ingest.texts import read_texts
from megatron.errors import ConfigError, run_command
from megatron.tokenizer.train import NORMALIZERS, train_byte_level_bpe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", "--json_input_dir", required=True, nargs="+", action="extend", metavar="PATH",
        help="as of preprocess_data.py",
    )  # fmt: skip
    parser.add_argument(
        "--output", "--tokenizer_output_path", required=True, metavar="FILE",
        help="the tokenizer.json to write",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-type", "--tokenizer_type", choices=("BPE",), default="BPE",
        help="the only kind: byte-level BPE",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--vocab-size", "--vocab_size", type=int, default=52000,
        help="ids, special tokens included (default: 52000)",
    )  # fmt: skip
    parser.add_argument("--jsonl-keys", nargs="+", default=["text"], metavar="KEY")
    parser.add_argument(
        "--normalizer", choices=NORMALIZERS, default="none",
        help="Unicode normal form applied to text (default: none, so that decoding gives the "
        "text back; GPT-NeoX's trainer uses NFKC)",
    )  # fmt: skip
    parser.add_argument(
        "--add-prefix-space", action="store_true",
        help="treat the first word of a text like any other (GPT-NeoX's trainer does)",
    )  # fmt: skip
    parser.add_argument(
        "--max-documents", type=int, metavar="N", help="train on the first N documents only"
    )
    parser.add_argument("--text-documents", choices=("file", "line"), default="file")
    found = parser.parse_args(arguments)
    if not found.output.endswith(".json"):
        raise ConfigError(f"--output {found.output}: a tokenizer is a .json file")
    texts: Iterator[str] = read_texts(
        found.input, keys=found.jsonl_keys, text_documents=found.text_documents
    )
    if found.max_documents is not None:
        texts = itertools.islice(texts, found.max_documents)
    size = train_byte_level_bpe(
        texts,
        found.output,
        vocab_size=found.vocab_size,
        normalizer=found.normalizer,
        add_prefix_space=found.add_prefix_space,
        progress=sys.stderr.isatty(),
    )
    print(f"{found.output}: {size:,} ids")
    if size < found.vocab_size:
        print(f"note: the text gave no more than that; {found.vocab_size:,} were asked for")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
