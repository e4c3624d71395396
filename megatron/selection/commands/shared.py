"""Flags that several subcommands have, and what is made of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron.errors import ConfigError
from megatron.selection.domain_output import TokenizerChoice
from megatron.selection.inputs import Inputs
from megatron.tokenizer import TOKENIZER_TYPES

if TYPE_CHECKING:
    from megatron.config import Config


def parser_of(prog: str, about: str | None) -> argparse.ArgumentParser:
    """Return an empty parser whose help begins with a docstring."""
    return argparse.ArgumentParser(
        prog=prog,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flags that name a configuration; ``what`` says what is taken from it."""
    group = parser.add_argument_group("a configuration")
    group.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="FILE",
        help=f"configuration files, merged; taken from them: {what}",
    )  # fmt: skip
    group.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of those files")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set a key, over the files (several may follow, or repeat the flag)",
    )  # fmt: skip


def add_tokenizer_arguments(parser: argparse.ArgumentParser, why: str) -> None:
    """Add the flags that name a tokenizer; ``why`` says what it is for."""
    group = parser.add_argument_group("tokenizer", why)
    group.add_argument(
        "--tokenizer-type", metavar="TYPE", help=f"one of {', '.join(TOKENIZER_TYPES)}"
    )
    group.add_argument(
        "--vocab-file", metavar="FILE",
        help="tokenizer.json, vocab.json, sentencepiece model, or tiktoken file or encoding name",
    )  # fmt: skip
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT2BPETokenizer")
    group.add_argument(
        "--tokenizer-path", metavar="FOLDER",
        help="a Hugging Face tokenizer with a chat template, for conversations",
    )  # fmt: skip


def add_field_argument(group: argparse._ActionsContainer) -> None:
    """Add the flag that names the key of the text."""
    group.add_argument(
        "--field", metavar="KEY",
        help="key (or column) that holds the text or the conversation (default: the first of "
        "messages, conversation, prompt and completion, text)",
    )  # fmt: skip


def read_configuration(options: argparse.Namespace) -> Config | None:
    """Return the configuration that was named; None if none was.

    Raises:
        ConfigError: it is refused.
    """
    if not options.config:
        if options.set or options.conf_dir:
            raise ConfigError("--set and -d belong to a configuration; name its files by --config")
        return None
    from megatron.training.program import read_config

    named = argparse.Namespace(
        resolved_config=None,
        conf_file=options.config,
        conf_dir=options.conf_dir,
        set=options.set,
    )
    return read_config(named)


def tokenizer_choice(options: argparse.Namespace, config: Config | None) -> TokenizerChoice:
    """Return the tokenizer that the flags, or else the configuration, name.

    Raises:
        ConfigError: there are files without a type.
    """
    kind, vocab, merges = options.tokenizer_type, options.vocab_file, options.merge_file
    if kind is None:
        if vocab or merges:
            raise ConfigError("--vocab-file and --merge-file belong to a --tokenizer-type; give it")
        if config is not None:
            named = config.tokenizer
            kind, vocab, merges = named.tokenizer_type, named.vocab_file, named.merge_file
    return TokenizerChoice(
        kind=kind, vocab_file=vocab, merge_file=merges, chat_path=options.tokenizer_path
    )


def inputs_of(options: argparse.Namespace, config: Config | None, words: list[str]) -> Inputs:
    """Return the corpus that the flags name."""
    return Inputs(
        words=tuple(words),
        field=options.field,
        text_documents=options.text_documents or "file",
        domains=None if config is None else config.domains,
        split="" if config is None else config.split,
    )


def add_text_documents_argument(group: argparse._ActionsContainer) -> None:
    """Add the flag that says what a document is in plain text."""
    group.add_argument(
        "--text-documents", choices=("file", "line"),
        help="what is a document in a plain-text file (default: the file)",
    )  # fmt: skip
