"""What a run amounts to, worked out before it starts.  No torch in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.config import Config, TokenizerConfig, resolve_batch
from megatron.errors import ConfigError
from megatron.model.accounting import flops_per_token, parameter_count
from megatron.monitor.throughput import short
from megatron.training.domains import OpenDomains

FloatArray = npt.NDArray[np.float64]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes of a run on a layout.

    Attributes:
        parameters: of the whole model.
        flops_per_token: forward and backward.
        total_flops: of the whole run, without validation.
        state_bytes: weights, gradients and optimizer state on one rank.
        activation_bytes: activations of one micro-batch on one rank (about 34 bytes per
            hidden unit, layer and token without recomputation; one block's worth and the
            block inputs with it).
        checkpoint_bytes: one checkpoint on disk, all ranks together.
    """

    parameters: int
    flops_per_token: float
    total_flops: float
    state_bytes: float
    activation_bytes: float
    checkpoint_bytes: int


def complete(config: Config, domains: OpenDomains) -> Config:
    """Fill in ``model.vocab_size`` from the tokenizer, or else from the data.

    Raises:
        ConfigError: neither the configuration nor the tokenizer nor the data says it, or
            they contradict each other.
    """
    from_data = domains.vocab_size
    from_tokenizer = _tokenizer_vocab(config.tokenizer)
    given = config.model.vocab_size
    known = [
        (value, name)
        for value, name in (
            (given, "vocab_size"),
            (from_tokenizer, "the tokenizer"),
            (from_data, "the data"),
        )
        if value is not None
    ]
    if not known:
        raise ConfigError(
            "the vocabulary size is not known: give vocab_size or tokenizer_type and vocab_file "
            "(data preprocessed by tools/preprocess_data.py carries it in its .meta.json)"
        )
    size, source = known[0]
    if from_data is not None and size < from_data:
        raise ConfigError(
            f"{source} has {size} token ids, but the data was tokenised with {from_data}; use the "
            "data's tokenizer, or set vocab_size to at least that"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def check_device(config: Config, *, on_cpu: bool) -> None:
    """Refuse what the device or DeepSpeed cannot do.

    Raises:
        ConfigError: fp16 on a CPU, which DeepSpeed does not run; steps to be left out under
            a forced ZeRO stage 0, which applies them.
    """
    if config.zero_stage == 0 and config.training.nonfinite_limit:
        raise ConfigError(
            f"on_nonfinite is {config.training.on_nonfinite}, but deepspeed_extra_args forces ZeRO "
            "stage 0, under which DeepSpeed applies a gradient that is not finite; take stage 1, "
            "or on_nonfinite: stop"
        )
    if config.precision == "fp16" and on_cpu:
        raise ConfigError(
            "precision is fp16, which DeepSpeed does not run on a CPU; use bf16 or fp32 there"
        )


def estimate(config: Config, data_size: int) -> Estimate:
    """Work out the sizes of a run on ``data_size`` data-parallel ranks."""
    micro, _, total = resolve_batch(config.batch, data_size)
    parameters = parameter_count(config.model)
    per_token = flops_per_token(config.model)
    model, width, stage = config.model, _BYTES[config.precision], config.zero.effective_stage
    # fp32 master, two Adam moments; a copy of the weights where they are not fp32 themselves
    optimizer = parameters * 12 / data_size
    weights = parameters * width / (data_size if stage == 3 else 1)
    gradients = parameters * width / (data_size if stage >= 2 else 1)
    tokens = micro * model.context_length
    per_block = 34 * model.hidden_size * width / 2
    if model.checkpoint_activations:
        blocks = per_block * model.checkpoint_num_layers + 2 * width * model.hidden_size * (
            model.num_layers / model.checkpoint_num_layers
        )
    else:
        blocks = per_block * model.num_layers
    return Estimate(
        parameters=parameters,
        flops_per_token=per_token,
        total_flops=per_token * config.training.train_iters * total * model.context_length,
        state_bytes=optimizer + weights + gradients,
        activation_bytes=blocks * tokens,
        checkpoint_bytes=checkpoint_bytes(config),
    )


def checkpoint_bytes(config: Config) -> int:
    """Estimate the size of a checkpoint: weights, fp32 master weights and two moments."""
    return int(parameter_count(config.model) * (12 + _BYTES[config.precision]) * 1.02) + (1 << 17)


def startup_report(
    config: Config,
    domains: OpenDomains,
    weights: FloatArray,
    data_size: int,
    say: Callable[[str], None],
) -> None:
    """Say what will be trained on what: batch arithmetic, sizes, tokens and epochs per domain."""
    micro, accumulation, total = resolve_batch(config.batch, data_size)
    sizes, model = estimate(config, data_size), config.model
    iters, tokens = config.training.train_iters, total * model.context_length
    say(
        f"batch: {micro} per rank × {accumulation} accumulated × {data_size} data ranks = {total} "
        f"samples of {model.context_length} tokens = {tokens:,} tokens per step; {iters:,} steps = "
        f"{short(float(tokens * iters))} tokens"
    )
    say(
        f"model: {sizes.parameters:,} parameters (vocabulary {model.vocab_size:,} padded to "
        f"{model.padded_vocab_size():,}), {config.precision}, {sizes.flops_per_token / 1e9:.3g} "
        f"GFLOP per token, {sizes.total_flops:.3g} FLOP in all"
    )
    stage = config.zero.stage
    as_run = " (0 is run as 1: the same numbers)" if stage == 0 else ""
    say(
        f"memory per rank: {_size(sizes.state_bytes)} of weights, gradients and optimizer, about "
        f"{_size(sizes.activation_bytes)} of activations; ZeRO stage "
        f"{config.zero.effective_stage}{as_run}; a checkpoint takes about "
        f"{_size(sizes.checkpoint_bytes)}"
    )
    mixing = config.mixing
    say(
        f"mixing: {mixing.method}, draw {mixing.draw} by {mixing.unit}, lag {mixing.lag}, "
        f"exhausted domains: {mixing.on_exhausted}"
    )
    for line in domain_table(config, domains, weights, total):
        say(line)
    for note in domains.notes:
        say(f"note: {note}")
    if config.ignored:
        say(f"keys without effect here: {', '.join(config.ignored)}")


def domain_table(
    config: Config, domains: OpenDomains, weights: FloatArray, global_batch: int
) -> list[str]:
    """Return the lines of a table: tokens, start share and epochs if that share were kept."""
    samples = config.training.train_iters * global_batch
    shares = weights / weights.sum()
    width = max(6, *(len(name) for name in domains.names))
    lines = [
        f"{'domain':<{width}} {'documents':>10} {'tokens':>8} {'start share':>11} "
        f"{'epochs at it':>12} {'valid':>8} {'test':>8}"
    ]
    for index, (name, train) in enumerate(zip(domains.names, domains.train, strict=True)):
        held_out = [
            "-" if part is None else short(float(part.num_tokens))
            for part in (domains.valid[index], domains.test[index])
        ]
        epochs = samples * shares[index] / train.num_windows(0)
        lines.append(
            f"{name:<{width}} {train.num_documents:>10,} {short(float(train.num_tokens)):>8} "
            f"{shares[index]:>11.4f} {epochs:>12.2f} {held_out[0]:>8} {held_out[1]:>8}"
        )
    return lines


def _tokenizer_vocab(tokenizer: TokenizerConfig) -> int | None:
    if tokenizer.tokenizer_type is None:
        return None
    from megatron.tokenizer import build_tokenizer

    return int(
        build_tokenizer(
            tokenizer.tokenizer_type,
            vocab_file=tokenizer.vocab_file,
            merge_file=tokenizer.merge_file,
        ).vocab_size
    )


def _size(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
