"""Rules between groups that no single group can know."""

from __future__ import annotations

import re
from typing import Any

from megatron.config.attention import MIXERS
from megatron.config.config import Config
from megatron.config.draft import Draft
from megatron.config.expert_ranks import check_expert_ranks
from megatron.config.node import Node
from megatron.config.run_checks import check_run
from megatron.config.suggest import did_you_mean


def check(config: Config, draft: Draft) -> None:
    """Add a problem for every rule between groups that is broken."""
    _check_schedule(config, draft)
    _check_batch(config, draft)
    _check_tensor_ranks(config, draft)
    _check_mixers(config, draft)
    check_expert_ranks(config, lambda group, name, text: _add(draft, group, name, text))
    _check_prompt(config, draft)
    _check_lora(config, draft)
    _check_mup(config, draft)
    _check_pipeline(config, draft)
    _check_offload(config, draft)
    _check_optimizer(config, draft)
    _check_statistics(config, draft)
    _check_extra(config, draft)
    _check_targets(config, draft)
    _check_weights(config, draft)
    _check_tokenizer(config, draft)
    _check_bounds(config, draft)
    _check_guardrail(config, draft)
    _check_reading(config, draft)
    check_run(config, lambda group, name, text: _add(draft, group, name, text))


def _add(draft: Draft, group: str, name: str, text: str) -> None:
    node = draft.get(group, name)
    if node is None:
        draft.problems.add_plain(f"{name}: {text}")
    else:
        draft.problems.add(node, text)


def _check_schedule(config: Config, draft: Draft) -> None:
    if config.schedule.min_lr > config.optimizer.lr:
        _add(
            draft,
            "schedule",
            "min_lr",
            f"is above the peak learning rate ({config.optimizer.lr})",
        )


def _check_batch(config: Config, draft: Draft) -> None:
    batch = config.batch
    if batch.train_batch_size is None and batch.train_micro_batch_size_per_gpu is None:
        draft.problems.add_plain(
            "train_micro_batch_size_per_gpu: required, and given in none of the files "
            "(samples per rank and pass; or train_batch_size, samples per optimizer step)"
        )
    elif batch.train_batch_size is not None:
        parts = (batch.train_micro_batch_size_per_gpu or 1) * (
            batch.gradient_accumulation_steps or 1
        )
        if batch.train_batch_size % parts:
            _add(
                draft,
                "batch",
                "train_batch_size",
                "is not divisible by train_micro_batch_size_per_gpu × "
                f"gradient_accumulation_steps = {parts}",
            )


def _check_tensor_ranks(config: Config, draft: Draft) -> None:
    """Whatever tensor ranks divide can be divided."""
    ranks, model = config.parallel.model_parallel_size, config.model
    divided = [
        ("num_attention_heads", model.num_attention_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
    ]
    if config.parallel.sequence_parallel:
        divided.append(("seq_length", model.seq_length))
    for name, value in divided:
        if value is not None and value % ranks:
            _add(
                draft,
                "parallel",
                "model_parallel_size",
                f"does not divide {name} ({value}); use one that does, or change {name}",
            )


def _check_mixers(config: Config, draft: Draft) -> None:
    """Blocks that mix positions by a matrix of their own are whole on every tensor rank."""
    kinds = set(config.model.attention_config or ()) & set(MIXERS)
    if kinds and config.parallel.model_parallel_size > 1:
        _add(
            draft,
            "parallel",
            "model_parallel_size",
            f"is above 1 with {' and '.join(sorted(kinds))} in attention_config, whose blocks are "
            "not divided among tensor ranks; use 1 (data ranks, ZeRO and pipelines work)",
        )


def _check_prompt(config: Config, draft: Draft) -> None:
    """Where a prompt alone is trained every rank must hold it, and it must be whole."""
    prompt = config.model.soft_prompt_tuning
    if prompt is None:
        return
    for hindered, text in (
        (config.parallel.stages > 1, "a pipeline: only its first stage would train; use 1 stage"),
        (config.zero_stage == 3, "ZeRO 3, which divides what is frozen too; use stage 2"),
        (config.parallel.sequence_parallel, "sequence_parallel: the prompt is not divided"),
    ):
        if hindered:
            _add(draft, "model", "soft_prompt_tuning", f"does not go with {text}")
    if prompt.init_string and config.tokenizer.tokenizer_type is None:
        _add(
            draft,
            "model",
            "soft_prompt_tuning",
            "init_string needs a tokenizer; set tokenizer_type and vocab_file",
        )


def _check_lora(config: Config, draft: Draft) -> None:
    """What is frozen is whole on its ranks."""
    if config.model.lora is not None and config.zero_stage == 3:
        text = "does not go with ZeRO 3, which divides what is frozen too; use stage 2"
        _add(draft, "model", "lora", text)


def _check_mup(config: Config, draft: Draft) -> None:
    """Rates by width are known for Adam's kind, and every stage has all groups of parameters."""
    if not config.model.use_mup:
        return
    if config.optimizer.type not in ("adamw", "adam", "adam8bit", "lion"):
        _add(
            draft,
            "model",
            "use_mup",
            f"scales learning rates as Adam wants it, not {config.optimizer.type}; use Adam",
        )
    if config.parallel.stages > 2:
        _add(
            draft,
            "model",
            "use_mup",
            "goes with at most 2 stages of a pipeline: those between the ends have no embedding, "
            "whose learning rate is one of its own; use pipe_parallel_size: 2",
        )


def _check_pipeline(config: Config, draft: Draft) -> None:
    """A pipeline has a layer for every stage, and ZeRO leaves its gradients whole."""
    stages = config.parallel.stages
    method = config.parallel.pipe_partition_method
    if not _is_partition_method(method):
        _add(
            draft,
            "parallel",
            "pipe_partition_method",
            "should be 'parameters', 'uniform' or 'type:REGEX', such as type:transformer",
        )
    if stages == 1:
        return
    if stages > config.model.num_layers:
        _add(
            draft,
            "parallel",
            "pipe_parallel_size",
            f"is above num_layers ({config.model.num_layers}); every stage needs a block",
        )
    if config.zero_stage > 1:
        _add(
            draft,
            "zero",
            "stage",
            f"is {config.zero_stage} with pipe_parallel_size {stages}: a pipeline keeps its "
            "gradients and weights whole; use zero_optimization: {stage: 1}, or no pipeline",
        )
    if config.zero_stage == 0:
        for hindered, what, remedy in (
            (config.gradient_clipping > 0, "clips by the first stage's norm alone", "clipping"),
            (config.precision == "bf16", "cannot reload bf16 weights", "bf16"),
        ):
            if hindered:
                _at(
                    draft,
                    draft.get("deepspeed", "zero_optimization"),
                    "deepspeed_extra_args.zero_optimization",
                    f"stage 0 is forced, under which DeepSpeed {what} in a pipeline; use stage 1, "
                    f"no {remedy} or no pipeline",
                )


def _check_optimizer(config: Config, draft: Draft) -> None:
    """What looks at a parameter's shape, or on a device alone, finds both."""
    kind = config.optimizer.type
    if kind == "sm3" and (config.zero_stage not in (1, 2) or "offload_optimizer" in _zero(config)):
        where = (
            "offload_optimizer"
            if "offload_optimizer" in _zero(config)
            else f"ZeRO stage {config.zero_stage}"
        )
        _add(
            draft,
            "optimizer",
            "type",
            f"SM3 keeps sums over whole rows and columns, which {where} leaves no room for; use "
            "zero_optimization: {stage: 1} or 2 without offload, or Adam",
        )
    if kind == "adam8bit" and "offload_optimizer" in _zero(config):
        _add(
            draft,
            "optimizer",
            "type",
            "8-bit state lives on a CUDA device; remove offload_optimizer, or use Adam",
        )


def _check_statistics(config: Config, draft: Draft) -> None:
    """What is measured of gradients can be, in this layout."""
    logging, tied = config.logging, not config.model.no_weight_tying
    if logging.log_gradient_noise_scale and config.parallel.stages > 1 and tied:
        _add(
            draft,
            "logging",
            "log_gradient_noise_scale",
            "a pipeline's first and last stage each hold half of the tied weights' gradient, and "
            "add them up once a step only; use no_weight_tying: true, or no pipeline",
        )
    if config.zero_stage == 0:
        for key in logging.statistics_keys:
            _add(draft, "logging", key, "is read off ZeRO's flat parts; use stage 1, not 0")


def _zero(config: Config) -> dict[str, Any]:
    """Return the options of ZeRO, those that are handed to DeepSpeed unread among them."""
    forced = config.deepspeed.get("zero_optimization")
    return {**config.zero.options, **(forced if isinstance(forced, dict) else {})}


def _check_extra(config: Config, draft: Draft) -> None:
    """DeepSpeed's own options do not contradict what the layout rests on."""
    pipeline = config.deepspeed.get("pipeline")
    if not config.parallel.sequence_parallel or not isinstance(pipeline, dict):
        return
    for key in ("pipe_partitioned", "grad_partitioned"):
        if pipeline.get(key):
            _at(
                draft,
                draft.get("deepspeed", "pipeline"),
                "deepspeed_extra_args",
                f"{key} takes the activations of tensor ranks for "
                "copies of each other, which sequence_parallel makes untrue; remove one of the two",
            )


def _check_offload(config: Config, draft: Draft) -> None:
    """Parameters can be kept on the host only where they are divided."""
    if "offload_param" in config.zero.options and config.zero_stage != 3:
        _at(
            draft,
            draft.get("zero", "options"),
            "zero_optimization",
            f"offload_param belongs to stage 3, and the stage is "
            f"{config.zero_stage}; use stage: 3, or offload_optimizer alone",
        )


def _is_partition_method(method: str) -> bool:
    name, _, pattern = method.partition(":")
    if name.lower() != "type":
        return method.lower() in ("parameters", "uniform")
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


def _check_targets(config: Config, draft: Draft) -> None:
    """Something is trained on, and what is only measured has no share in it."""
    domains = draft.get("", "domains")
    for name, domain in config.domains.items():
        if domain.target and domain.weight:
            node = domains.at([name]) if domains is not None else None
            _at(draft, node, name, "is a target, which is never trained on; leave its weight out")
    if not config.trained:
        _at(draft, domains, "domains", "every domain is a target; one must be trained on")


def _check_weights(config: Config, draft: Draft) -> None:
    weighted = {name for name, domain in config.trained.items() if domain.weight is not None}
    unweighted = [name for name in config.trained if name not in weighted]
    mode = config.mixing.weights
    if mode not in (None, "given") or not (weighted or mode == "given"):
        return
    domains = draft.get("", "domains")
    if unweighted:
        text = "has no weight, though "
        text += "mixing.weights is 'given'" if mode == "given" else "other domains have one"
        text += "; give every domain a weight, or choose mixing: {weights: natural}"
        node = domains.at([unweighted[0]]) if domains is not None else None
        _at(draft, node, unweighted[0], text)
    elif not any(domain.weight for domain in config.trained.values()):
        _at(draft, domains, "domains", "every weight is 0; at least one must be above 0")


def _at(draft: Draft, node: Node | None, name: str, text: str) -> None:
    if node is None:
        draft.problems.add_plain(f"{name}: {text}")
    else:
        draft.problems.add(node, text, show=False)


def _check_tokenizer(config: Config, draft: Draft) -> None:
    tokenizer = config.tokenizer
    kind = tokenizer.tokenizer_type
    if kind is None and tokenizer.vocab_file is not None:
        _add(draft, "tokenizer", "vocab_file", "tokenizer_type should say what this file is")
    needs_vocab = kind in ("HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer")
    if needs_vocab and tokenizer.vocab_file is None:
        _add(draft, "tokenizer", "tokenizer_type", "needs vocab_file beside it")
    if kind == "GPT2BPETokenizer" and tokenizer.merge_file is None:
        _add(draft, "tokenizer", "tokenizer_type", "needs merge_file beside it")


def _check_guardrail(config: Config, draft: Draft) -> None:
    """A guardrail sees report validations, and nothing without them."""
    training, node = config.training, draft.options.get("guardrail")
    if node is None or config.mixing.options.get("guardrail") is None:
        return
    if training.eval_iters == 0:
        draft.problems.add(
            node, "eval_iters is 0, so that there are no validations to see; raise it", show=False
        )
    elif training.eval_interval >= training.train_iters:
        draft.problems.add(
            node,
            f"eval_interval is {training.eval_interval}, so that no validation comes before the "
            f"end of the {training.train_iters} steps; lower it",
            show=False,
        )


def _check_reading(config: Config, draft: Draft) -> None:
    """What becomes of windows fits the data and what is compared by their place."""
    data = config.data
    labelled = [name for name, domain in config.trained.items() if domain.train_labels]
    marks = (data.fim_prefix_token, data.fim_suffix_token, data.fim_middle_token)
    if data.fim_rate and labelled:
        _add(
            draft,
            "data",
            "fim_rate",
            f"moves tokens, and the labels of '{labelled[0]}' stay; use fim_rate: 0, or no labels",
        )
    if data.fim_rate and config.tokenizer.tokenizer_type is None:
        names = [mark for mark in marks if isinstance(mark, str)]
        if names or data.fim_level == "character":
            why = f"to know {names[0]}" if names else "to cut between characters"
            _add(
                draft,
                "data",
                "fim_rate",
                f"needs tokenizer_type and vocab_file {why} (or fim_level: token and ids)",
            )
    _check_curriculum(config, draft)


def _check_curriculum(config: Config, draft: Draft) -> None:
    """Every length of a curriculum can be run."""
    curriculum, full = config.data.curriculum_learning, config.model.context_length
    if curriculum is None or not curriculum.enabled:
        return
    steps = curriculum.lengths(min(config.training.train_iters, curriculum.steps + 1), full)
    ranks = config.parallel.model_parallel_size if config.parallel.sequence_parallel else 1
    if max(steps) > full:
        text = f"reaches {max(steps)} tokens, and seq_length is {full}"
    elif any(length % ranks for length in steps):
        wrong = next(length for length in steps if length % ranks)
        text = (
            f"has rows of {wrong} tokens, which {ranks} tensor ranks cannot divide under "
            f"sequence_parallel; use a difficulty_step that is a multiple of {ranks}"
        )
    else:
        return
    _add(draft, "data", "curriculum_learning", text)


def _group_names(config: Config, domains: list[str]) -> list[str]:
    """Return the names of the groups that the domains are in; none without groups."""
    groups = config.mixing.options.get("groups")
    if groups is None:
        return []
    members = groups.get("members")
    found = [name.partition("/")[0] for name in domains] if members is None else [*members]
    return list(dict.fromkeys(found))


def _check_bounds(config: Config, draft: Draft) -> None:
    """Floors and ceilings name existing domains, and some distribution keeps to them."""
    names = list(config.trained)
    groups = _group_names(config, names)
    for key, missing in (("floor", 0.0), ("ceiling", 1.0)):
        node = draft.options.get(key)
        if node is None or key not in config.mixing.options:
            continue
        value = config.mixing.options[key]
        if isinstance(value, dict):
            known = [*names, *groups]
            unknown = [name for name in value if name not in known]
            kind = "domain or group" if groups else "domain"
            for name in unknown:
                draft.problems.add(
                    node.at([name]), f"there is no {kind} '{name}'{did_you_mean(name, known)}"
                )
            if groups:
                continue  # of two levels: the groups themselves check them together
            bounds = [value.get(name, missing) for name in names]
            if unknown:
                continue
        elif isinstance(value, list):
            bounds = value
            if len(value) != len(names):
                text = f"{len(value)} values for {len(names)} domains ({', '.join(names)})"
                draft.problems.add(node, text)
                continue
        elif groups:
            continue  # one number is for groups
        else:
            bounds = [value] * len(names)
        total = sum(bounds)
        if not all(0 <= bound <= 1 for bound in bounds):
            draft.problems.add(node, "should be between 0 and 1")
        elif key == "floor" and total > 1 + 1e-12:
            draft.problems.add(node, f"the floors of {len(names)} domains sum to {total:.6g} > 1")
        elif key == "ceiling" and total < 1 - 1e-12:
            draft.problems.add(node, f"the ceilings of {len(names)} domains sum to {total:.6g} < 1")
