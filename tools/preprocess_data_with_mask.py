#!/usr/bin/env python3
r"""Tokenise text, and write beside it which tokens are trained on.

    python tools/preprocess_data_with_mask.py --input chats.jsonl --tokenizer-type HFTokenizer \
        --vocab-file tokenizer.json --mask-before-token 27,91,318 --output-prefix data/chats

Everything up to and including the first of the tokens is left out of the loss.  Name the labels
under the domain: {train: data/chats_text_document, train_labels: data/chats_label_document}.
All other flags are those of preprocess_data.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.ingest.masking import write_labels
from megatron.data.reader import TokenReader
from megatron.errors import ConfigError, run_command
from tools import preprocess_data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--input, --tokenizer-type and --output-prefix are required.",
    )
    parser.add_argument(
        "--mask-before-token", metavar="ID[,ID…]",
        help="token ids that follow each other at the end of what is not trained on; without "
        "them no labels are written",
    )  # fmt: skip
    given, rest = parser.parse_known_args(arguments)
    marker = _marker(given.mask_before_token)
    settings = preprocess_data.parse_arguments(rest)
    if marker and "label" in settings.keys:
        raise ConfigError("--jsonl-keys label: labels are written under that name; rename the key")
    code = preprocess_data.main(rest)
    if code or not marker:
        return code
    for key in settings.keys:
        tokens = f"{settings.output_prefix}_{key}_document"
        name = "label" if len(settings.keys) == 1 else f"{key}_label"
        labels = f"{settings.output_prefix}_{name}_document"
        trained = write_labels(tokens, labels, marker, overwrite=True)
        with TokenReader(tokens) as reader:
            print(f"{labels}.bin: {trained:,} of {reader.num_tokens:,} tokens are trained on")
    return 0


def _marker(text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        marker = [int(part) for part in text.split(",")]
    except ValueError:
        marker = []
    if not marker or min(marker) < 0:
        raise ConfigError(
            f"--mask-before-token {text}: should be token ids with commas between, such as 27,91"
        )
    return marker


if __name__ == "__main__":
    sys.exit(run_command(main))
