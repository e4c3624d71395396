"""What a run amounts to, worked out before it starts.  No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config import Config, TokenizerConfig
from megatron.errors import ConfigError
from megatron.monitor.throughput import short
from megatron.parallel.layout import Layout
from megatron.training.domains import OpenDomains
from megatron.training.plan import make_plan
from megatron.training.plan.report import active
from megatron.training.plan.units import size

FloatArray = npt.NDArray[np.float64]


def complete(config: Config, domains: OpenDomains) -> Config:
    """Fill in ``model.vocab_size`` from the tokenizer, or else from the data.

    Where something begins anew with every document, ``model.eod_token_id`` is filled in too.

    Raises:
        ConfigError: neither the configuration nor the tokenizer nor the data says it, or
            they contradict each other.
    """
    from_data = domains.vocab_size
    from_tokenizer = tokenizer_vocabulary(config.tokenizer)
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
    filled = {"vocab_size": size, "eod_token_id": _document_end(config, domains, size)}
    return config.model_copy(update={"model": config.model.model_copy(update=filled)})


def _document_end(config: Config, domains: OpenDomains, vocab_size: int) -> int | None:
    """Return the token that ends documents: the configuration's, or the data's where needed."""
    model, given = config.model, config.model.eod_token_id
    asked = [key for key in ("reset_attention_mask", "reset_position_ids") if getattr(model, key)]
    if not asked:
        return given
    found = domains.eod_id if given is None else given
    if found is None:
        raise ConfigError(
            f"{asked[0]} is on, but no domain's .meta.json names the end-of-document token; set "
            "eod_token_id, or preprocess the data again with --append-eod"
        )
    if found >= vocab_size:
        raise ConfigError(
            f"eod_token_id is {found}, but there are {vocab_size} token ids; take one below that"
        )
    return found


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
    if config.zero_stage == 0 and config.training.spike_policy[0] == "skip":
        raise ConfigError(
            f"on_loss_spike is {config.training.on_loss_spike}, but deepspeed_extra_args forces "
            "ZeRO stage 0, whose updates cannot be left out; take stage 1, or rollback(k)"
        )
    if config.precision == "fp16" and on_cpu:
        raise ConfigError(
            "precision is fp16, which DeepSpeed does not run on a CPU; use bf16 or fp32 there"
        )


def startup_report(
    config: Config,
    domains: OpenDomains,
    weights: FloatArray,
    layout: Layout,
    say: Callable[[str], None],
    *,
    on_cpu: bool,
) -> None:
    """Say what will be trained on what: batch arithmetic, sizes, tokens and epochs per domain."""
    plan, model = make_plan(config, layout, on_cpu=on_cpu), config.model
    micro, accumulation, total = plan.micro, plan.accumulation, plan.total
    iters, tokens = config.training.train_iters, total * model.context_length
    trained = total * config.data.tokens_per_row(iters, model.context_length)
    curriculum = " at most" if trained < tokens * iters else ""
    say(
        f"batch: {micro} per rank × {accumulation} accumulated × {layout.data_size} data ranks = "
        f"{total} samples of {model.context_length} tokens = {tokens:,} tokens per step"
        f"{curriculum}; {iters:,} steps = {short(float(trained))} tokens"
    )
    say(
        f"model: {plan.parameters:,} parameters{active(plan)} (vocabulary {model.vocab_size:,} "
        f"padded to {model.padded_vocab_size(layout.tensor_size):,}), {config.precision}, "
        f"{plan.flops_per_token / 1e9:.3g} GFLOP per token, "
        f"{plan.flops_per_token * trained:.3g} FLOP in all"
    )
    stage = config.zero.stage
    as_run = " (0 is run as 1: the same numbers)" if stage == 0 else ""
    worst = plan.worst
    where = f" (stage {worst.stage} of {layout.pipe_size})" if layout.pipe_size > 1 else ""
    held, activations = worst.states, worst.activations
    lasting, buffers = held.weights + held.gradients + held.optimizer, held.bucket + held.gathered
    say(
        f"memory per rank{where}: {size(lasting)} of weights, gradients and optimizer, "
        f"{size(buffers)} of buffers, about {size(activations.total)} of activations; ZeRO stage "
        f"{config.zero_stage}{as_run}; a checkpoint takes about {size(plan.checkpoint_bytes)} "
        "(--plan says more)"
    )
    mixing = config.mixing
    say(
        f"mixing: {mixing.method}, draw {mixing.draw} by {mixing.unit}, lag {mixing.lag}, "
        f"exhausted domains: {mixing.on_exhausted}"
    )
    if controls := _controls(mixing.options):
        say(f"controls: {controls}")
    for line in domain_table(config, domains, weights, total):
        say(line)
    for note in domains.notes:
        say(f"note: {note}")
    if config.ignored:
        say(f"keys without effect here: {', '.join(config.ignored)}")


def _controls(options: Mapping[str, Any]) -> str:
    """Return the controls that are on, in words; empty where a method stands alone."""
    said = []
    if options.get("shadow"):
        said.append("shadow (the given weights draw)")
    objective = options.get("objective") or {}
    if objective.get("kind", "uniform") != "uniform":
        said.append(f"objective {objective.get('weights') or objective['kind']}")
    if (groups := options.get("groups")) is not None:
        said.append(f"groups with {groups['shares']} shares")
    if (limit := options.get("max_epochs")) is not None:
        said.append(f"at most {limit} epochs")
    if (guardrail := options.get("guardrail")) is not None:
        said.append(
            f"guardrail (tolerance {guardrail['tolerance']} nats, fallback {guardrail['fallback']})"
        )
    return ", ".join(said)


def domain_table(
    config: Config, domains: OpenDomains, weights: FloatArray, global_batch: int
) -> list[str]:
    """Return the lines of a table: tokens, start share and epochs if that share were kept."""
    samples = config.training.train_iters * global_batch
    shares = weights / weights.sum()
    width = max(6, *(len(name) for name in domains.measured))
    lines = [
        f"{'domain':<{width}} {'documents':>10} {'tokens':>8} {'start share':>11} "
        f"{'epochs at it':>12} {'valid':>8} {'test':>8}"
    ]
    for index, (name, train) in enumerate(zip(domains.names, domains.train, strict=True)):
        held_out = _held_out(domains, index)
        epochs = samples * shares[index] / train.num_windows(0)
        lines.append(
            f"{name:<{width}} {train.num_documents:>10,} {short(float(train.num_tokens)):>8} "
            f"{shares[index]:>11.4f} {epochs:>12.2f} {held_out[0]:>8} {held_out[1]:>8}"
        )
    for index, name in enumerate(domains.targets, start=len(domains.names)):
        held_out = _held_out(domains, index)
        lines.append(
            f"{name:<{width}} {'-':>10} {'-':>8} {'target':>11} {'-':>12} {held_out[0]:>8} "
            f"{held_out[1]:>8}"
        )
    return lines


def _held_out(domains: OpenDomains, index: int) -> list[str]:
    return [
        "-" if part is None else short(float(part.num_tokens))
        for part in (domains.valid[index], domains.test[index])
    ]


def tokenizer_vocabulary(tokenizer: TokenizerConfig) -> int | None:
    """Return the number of token ids of the tokenizer that is named, or None if none is."""
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
