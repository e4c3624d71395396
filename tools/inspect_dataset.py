#!/usr/bin/env python3
"""Look into tokenised datasets: summary, documents, checksums, overlap.

python tools/inspect_dataset.py data/code_text_document
python tools/inspect_dataset.py data/code_text_document --documents 0 17 -1 --vocab-file tok.json
python tools/inspect_dataset.py data/*.idx --verify
python tools/inspect_dataset.py --overlap data/train_text_document data/valid_text_document
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from megatron.data.ingest.overlap import overlap
from megatron.data.ingest.verify import verify_dataset
from megatron.data.reader import TokenReader
from megatron.errors import EXIT_BAD_INPUT, DataError, run_command
from megatron.tokenizer import TOKENIZER_TYPES, Tokenizer, build_tokenizer

_SIZES_LOOKED_AT = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    found = parser.parse_args(arguments)
    if not found.prefix and not found.overlap:
        parser.error("name a dataset's prefix, or two with --overlap")
    tokenizer = None
    if found.vocab_file or found.tokenizer_type == "CharLevelTokenizer":
        tokenizer = build_tokenizer(
            found.tokenizer_type, found.vocab_file, found.merge_file, fast=False
        )
    code = 0
    for given in found.prefix:
        prefix = given[:-4] if given.endswith((".bin", ".idx")) else given
        if found.verify:
            code = max(code, _verify(prefix))
            continue
        with TokenReader(prefix) as reader:
            print("\n".join(_summary(reader)))
            for number in found.documents or ():
                print(_document(reader, number, tokenizer, found.tokens))
    if found.overlap:
        _overlap(found)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prefix", nargs="*", help="of a dataset, with or without .bin or .idx")
    parser.add_argument(
        "--verify", action="store_true",
        help="read every byte: sizes, token type, pointers, token ids, checksums; exit 2 if wrong",
    )  # fmt: skip
    parser.add_argument(
        "--documents", nargs="+", type=int, metavar="N",
        help="print these documents; negative numbers count from the end",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=256, metavar="N",
        help="print at most this many tokens of a document (default: 256; 0: all)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-type", default="HFTokenizer", metavar="TYPE",
        help=f"to print text: one of {', '.join(TOKENIZER_TYPES)} (default: HFTokenizer)",
    )  # fmt: skip
    parser.add_argument("--vocab-file", metavar="FILE", help="to print text instead of ids")
    parser.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT2BPETokenizer")
    parser.add_argument(
        "--overlap", nargs=2, metavar=("A", "B"),
        help="share of B's documents found in A, exactly and by 13-grams; each a prefix or a "
        "comma list of them",
    )  # fmt: skip
    parser.add_argument(
        "--max-documents", type=int, default=20_000, metavar="N",
        help="with --overlap: look at this many documents of B, evenly spread (default: 20000; "
        "0: all)",
    )  # fmt: skip
    return parser


def _summary(reader: TokenReader) -> list[str]:
    looked = min(reader.num_documents, _SIZES_LOOKED_AT)
    sizes = reader.document_sizes(0, looked)
    lines = [
        f"{reader.prefix}",
        f"  documents       {reader.num_documents:,}",
        f"  tokens          {reader.num_tokens:,} ({reader.dtype.name})",
    ]
    if looked:
        quantiles = np.percentile(sizes, (0, 50, 90, 100)).astype(int)
        of = "" if looked == reader.num_documents else f" (of the first {looked:,})"
        lines.append(
            "  document length min {:,}, median {:,}, 90 % {:,}, max {:,}".format(*quantiles) + of
        )
    lines.append(f"  fingerprint     {reader.fingerprint()[:16]}")
    sidecar = reader.sidecar
    if sidecar is None:
        lines.append("  sidecar         none: bytes per token, tokenizer and checksums unknown")
        return lines
    if sidecar.bytes_per_token is not None:
        lines.append(
            f"  text            {sidecar.bytes:,} bytes, {sidecar.bytes_per_token:.3f} a token"
        )
    end = f"ends with token {sidecar.eod_id}" if sidecar.append_eod else "no end token appended"
    lines.append(
        f"  tokenizer       {sidecar.tokenizer.get('type')}, {sidecar.vocab_size:,} ids, "
        f"{end}, SHA-256 {str(sidecar.tokenizer.get('sha256'))[:16]}"
    )
    return lines


def _document(reader: TokenReader, number: int, tokenizer: Tokenizer | None, most: int) -> str:
    index = number + reader.num_documents if number < 0 else number
    if not 0 <= index < reader.num_documents:
        raise DataError(
            f"--documents {number}: {reader.prefix} has documents 0 to {reader.num_documents - 1}"
        )
    start, size = reader.document_start(index), reader.document_size(index)
    shown = size if most <= 0 else min(size, most)
    ids = reader.read(start, start + shown).tolist()
    head = f"--- document {index}: {size:,} tokens" + (f", first {shown}" if shown < size else "")
    return f"{head}\n{tokenizer.decode(ids) if tokenizer else ' '.join(map(str, ids))}"


def _verify(prefix: str) -> int:
    found = verify_dataset(prefix)
    for line in found.checked:
        print(f"{prefix}: ok: {line}")
    for line in found.notes:
        print(f"note: {line}")
    for line in found.problems:
        print(f"error: {line}", file=sys.stderr)
    if not found.problems:
        print(f"{prefix}: sound")
    return EXIT_BAD_INPUT if found.problems else 0


def _overlap(found: argparse.Namespace) -> None:
    a, b = (given.split(",") for given in found.overlap)
    result = overlap(a, b, max_documents=found.max_documents or None)
    print(f"of B = {found.overlap[1]}, found in A = {found.overlap[0]}:")
    for line in result.lines():
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(run_command(main))
