#!/usr/bin/env python3
r"""Tokenise conversations by a tokenizer's chat template, and write which tokens are trained on.

    python tools/preprocess_data_with_chat_template.py --input chats.jsonl \
        --tokenizer-path models/chat --output-prefix data/chats

A line is {"conversation": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}.  Written
are {prefix}_{key}_document and, unless --no-mask is given, {prefix}_{key}_label_document: the
token where it is trained on (the turns of --generation-role), -100 elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.data.index_format import token_dtype
from megatron.data.ingest.chat import (
    ChatDocument,
    ChatSettings,
    check_settings,
    encode_conversations,
)
from megatron.data.ingest.stamps import stamp
from megatron.data.sidecar import Sidecar, write_sidecar
from megatron.data.writer import TokenWriter
from megatron.errors import ConfigError, DataError, run_command
from megatron.tokenizer.chat import chat_tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", action="extend", metavar="PATH",
        help="JSON lines, also compressed; files, folders, globs, comma lists")  # fmt: skip
    add("--jsonl-keys", nargs="+", default=["conversation"], metavar="KEY",
        help="fields that hold conversations (default: conversation)")  # fmt: skip
    add("--no-mask", action="store_true", help="train on every token; no labels are written")
    add("--for-rm", action="store_true", help="train on the last token alone (reward models)")
    add("--generation-role", default="assistant", metavar="ROLE",
        help="whose turns are trained on (default: assistant)")  # fmt: skip
    add("--only-last", action="store_true", help="train on the last turn alone")
    add("--reward-key", metavar="KEY", help="field of a number to write beside, as "
        "{prefix}_{key}_reward_document")  # fmt: skip
    add("--binary-reward", action="store_true", help="write 1 for a true reward, -1 for a false")
    add("--num-docs", type=int, metavar="N", help="number of lines, if known, for the progress")
    add("--tokenizer-path", required=True, metavar="FOLDER",
        help="a Hugging Face tokenizer with a chat template")  # fmt: skip
    add("--ftfy", action="store_true", help="repair the text with ftfy first")
    add("--output-prefix", required=True, metavar="PREFIX", help="without suffix")
    add("--dataset-impl", choices=("mmap",), default="mmap", help="the only format: MMIDIDX")
    add("--overwrite", action="store_true", help="replace what the prefix holds")
    add("--workers", type=int, default=1, help="processes that encode (default: 1)")
    add("--log-interval", type=int, default=100, metavar="N",
        help="lines between two progress reports (default: 100)")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    given = _parser().parse_args(arguments)
    if given.workers < 1 or given.log_interval < 1:
        raise ConfigError("--workers and --log-interval are at least 1")
    settings = ChatSettings(
        tokenizer_path=given.tokenizer_path,
        keys=tuple(given.jsonl_keys),
        role=given.generation_role,
        mask=not given.no_mask,
        only_last=given.only_last,
        for_rm=given.for_rm,
        reward_key=given.reward_key,
        binary_reward=given.binary_reward,
        ftfy=given.ftfy,
    )
    check_settings(settings)
    outputs = [
        _Output(given.output_prefix, key, settings, given.overwrite) for key in settings.keys
    ]
    records = encode_conversations(given.input, settings, workers=given.workers)
    with contextlib.ExitStack() as stack:
        for output in outputs:
            output.open(stack)
        for number, documents in enumerate(records, start=1):
            for output, document in zip(outputs, documents, strict=True):
                output.add(document)
            if number % given.log_interval == 0:
                total = f" of {given.num_docs:,}" if given.num_docs else ""
                print(f"{number:,}{total} lines", file=sys.stderr, flush=True)
    for output in outputs:
        print(output.finish())
    return 0


class _Output:
    """The datasets of one key."""

    def __init__(self, prefix: str, key: str, settings: ChatSettings, overwrite: bool) -> None:
        self._settings = settings
        self._tokenizer = chat_tokenizer(settings.tokenizer_path)
        self.names = {"tokens": f"{prefix}_{key}_document"}
        if settings.mask:
            self.names["labels"] = f"{prefix}_{key}_label_document"
        if settings.reward_key is not None:
            self.names["reward"] = f"{prefix}_{key}_reward_document"
        for name in self.names.values():
            if not overwrite and Path(name + ".idx").exists():
                raise DataError(f"{name}.idx exists; give --overwrite to replace it")
        self._writers: dict[str, TokenWriter] = {}
        self._trained = self._bytes = 0

    def open(self, stack: contextlib.ExitStack) -> None:
        """Start the files."""
        for what, name in self.names.items():
            dtype = token_dtype(len(self._tokenizer)) if what == "tokens" else "int32"
            self._writers[what] = stack.enter_context(TokenWriter(name, dtype))

    def add(self, document: ChatDocument) -> None:
        """Write one conversation."""
        self._writers["tokens"].add(document.tokens)
        if "labels" in self._writers:
            self._writers["labels"].add(document.labels)
        if "reward" in self._writers:
            self._writers["reward"].add([document.reward or 0])
        self._trained += sum(label >= 0 for label in document.labels)
        self._bytes += document.text_bytes

    def finish(self) -> str:
        """Write the sidecar of the tokens; return what was written, as a line."""
        name, writer = self.names["tokens"], self._writers["tokens"]
        end: Any = self._tokenizer.eos_token_id
        described = f"{self._tokenizer.chat_template}{sorted(self._tokenizer.get_vocab().items())}"
        write_sidecar(
            name,
            Sidecar(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                bytes=self._bytes,
                dtype=writer.dtype.name,
                vocab_size=len(self._tokenizer),
                append_eod=end is not None and self._settings.mask,
                eod_id=end,
                tokenizer={
                    "type": "chat_template",
                    "sha256": hashlib.sha256(described.encode()).hexdigest(),
                },
                bin=stamp(name + ".bin"),
                idx=stamp(name + ".idx"),
            ),
        )
        return (
            f"{name}.bin: {writer.num_documents:,} conversations, {writer.num_tokens:,} tokens, "
            f"{self._trained:,} of them trained on"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
