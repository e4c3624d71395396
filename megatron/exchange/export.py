"""Writing a checkpoint of ours as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.errors import CheckpointError, NeomixError
from megatron.exchange.architecture import NEOX, Architecture, choose_architecture
from megatron.exchange.hf_config import generation_config, hf_config
from megatron.exchange.hints import write_hints
from megatron.exchange.logits import (
    ROUNDING,
    TOLERANCE,
    Comparison,
    Rounded,
    compare,
    our_logits,
    sample_tokens,
    their_logits,
)
from megatron.exchange.pieces import pieces
from megatron.exchange.place import whole_folder
from megatron.exchange.shards import plan_shards, write_shards
from megatron.exchange.source import Source
from megatron.exchange.tokenizer_files import open_tokenizer, write_tokenizer
from megatron.exchange.updates import Merged, without_updates
from megatron.exchange.weights import Weights, open_weights, parameters, true_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by their names here."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a folder is written.

    Attributes:
        architecture: ``auto``, ``neox``, ``llama``, ``mistral`` or ``mixtral``.
        precision: ``auto`` (that of the training), ``fp32``, ``bf16`` or ``fp16``.
        tokenizer: whether the tokenizer goes with it.
        pad: token that fills up batches; None for none.
        max_shard_size: largest file of weights in bytes.
        tolerance: largest relative difference of logits.
    """

    architecture: str = "auto"
    precision: str = "auto"
    tokenizer: bool = True
    pad: int | None = None
    max_shard_size: int = 5 * 10**9
    tolerance: float = TOLERANCE


def export(
    source: Source, output: Path, options: ExportOptions, *, say: Callable[[str], None]
) -> Comparison:
    """Write a checkpoint as a Hugging Face folder, and compare the logits of the two.

    The folder appears when everything has been found equal; otherwise nothing is left.

    Args:
        source: the checkpoint.
        output: the folder; must not be there.
        options: how it is written.
        say: takes a line for the console.

    Raises:
        ConfigError: transformers has no model like it.
        CheckpointError: it cannot be read, or the logits differ.
        DataError: transformers has no form of the tokenizer that gives the same ids.
        RunError: the disk refuses.
    """
    architecture = choose_architecture(source.model, options.architecture)
    trained = str(source.manifest.layout.get("precision", "fp32"))
    precision = trained if options.precision == "auto" else options.precision
    for line in _notes(source, architecture):
        say(line)
    exact = precision != trained
    with (
        whole_folder(output) as folder,
        open_weights(
            source.path, source.manifest, source.model,
            exact=exact, scratch=output.absolute().parent, say=say,
        ) as weights,
    ):  # fmt: skip
        if source.model.lora is None:
            _write(folder, source, architecture, weights, precision, options, say)
            return _compare(folder, source, weights, precision, options, say)
        plain, merged = (
            replace(source, model=without_updates(source.model)), Merged(weights, source.model)
        )  # fmt: skip
        _write(folder, plain, architecture, merged, precision, options, say)
        _check_merged(plain, merged, source, weights, say)
        return _compare(folder, plain, merged, precision, options, say)


def _check_merged(
    plain: Source, merged: Weights, source: Source, weights: Weights, say: Callable[[str], None]
) -> None:
    """Compare the model whose weights have taken the updates up with the one beside them."""
    tokens = sample_tokens(source.model)
    found = compare(
        our_logits(plain.model, merged, tokens),
        our_logits(source.model, weights, tokens),
        bound=TOLERANCE,
        what="the model with its updates added to its weights",
    )
    say(f"updates of rank {getattr(source.model.lora, 'rank', 0)} added ({found.difference:.1e})")


def _notes(source: Source, architecture: Architecture) -> list[str]:
    model, lines = source.model, []
    if architecture is NEOX and model.num_kv_heads != model.num_attention_heads:
        lines.append(
            f"note: {architecture.class_name} has no shared keys and values; every one of the "
            f"{model.num_attention_heads} heads gets a copy of its own"
        )
    lines.append(
        f"writing {source.path} as {architecture.class_name}; of the vocabulary's rows the "
        f"{model.vocab_size} true ones, without padding"
    )
    return lines


def _write(
    folder: Path,
    source: Source,
    architecture: Architecture,
    weights: Weights,
    precision: str,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    model, dtype = source.model, DTYPES[precision]
    parts = pieces(model, architecture)
    shapes = {name: true_shape(one) for name, one in parameters(model).items()}
    if left := shapes.keys() - {piece.ours for piece in parts}:
        raise CheckpointError(f"parameters without a counterpart: {', '.join(sorted(left))}")
    tokenizer = open_tokenizer(source.tokenizer) if options.tokenizer else None
    eod = None
    if tokenizer is not None:
        write_tokenizer(
            folder, source.tokenizer, tokenizer,
            pad=options.pad, length=model.max_position_embeddings or model.context_length,
        )  # fmt: skip
        try:
            eod = tokenizer.eod
        except NeomixError as error:
            say(f"note: {error}; generation has no end")
    elif options.tokenizer:
        say("note: the run's configuration names no tokenizer_type; none is written")
    config = hf_config(
        model, architecture, dtype=str(dtype).removeprefix("torch."), eod=eod, pad=options.pad
    )
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config(eod=eod, pad=options.pad)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_hints(folder, model, step=source.manifest.step, precision=precision)
    write_shards(folder, plan_shards(parts, shapes, dtype, options.max_shard_size), weights, dtype)


def _compare(
    folder: Path,
    source: Source,
    weights: Weights,
    precision: str,
    options: ExportOptions,
    say: Callable[[str], None],
) -> Comparison:
    """Compare in float32 what was written with the weights that were meant to be."""
    tokens, dtype = sample_tokens(source.model), DTYPES[precision]
    theirs = their_logits(folder, tokens)
    rounded = our_logits(source.model, Rounded(weights, dtype), tokens)
    found = compare(rounded, theirs, bound=options.tolerance, what=f"{source.path} and {folder}")
    say(
        f"logits agree within {found.difference:.1e} of the largest one, on {found.tokens} random "
        "tokens"
    )
    if dtype != torch.float32:
        exact = our_logits(source.model, weights, tokens)
        lost = compare(exact, theirs, bound=ROUNDING, what=f"rounding the weights to {precision}")
        if lost.difference > found.difference:
            say(f"rounding the weights to {precision} moves them by {lost.difference:.1e}")
    return found
