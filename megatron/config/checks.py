"""Rules between groups that no single group can know."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.config.domain_checks import check_domains
from megatron.config.draft import Draft
from megatron.config.layout_checks import check_layout
from megatron.config.run_checks import check_run


def check(config: Config, draft: Draft) -> None:
    """Add a problem for every rule between groups that is broken."""
    _check_schedule(config, draft)
    _check_batch(config, draft)
    check_layout(config, draft)
    check_domains(config, draft)
    _check_tokenizer(config, draft)
    check_run(config, draft)


def _check_schedule(config: Config, draft: Draft) -> None:
    if config.schedule.min_lr > config.optimizer.lr:
        draft.refuse(
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
            draft.refuse(
                "batch",
                "train_batch_size",
                "is not divisible by train_micro_batch_size_per_gpu × "
                f"gradient_accumulation_steps = {parts}",
            )


def _check_tokenizer(config: Config, draft: Draft) -> None:
    tokenizer = config.tokenizer
    kind = tokenizer.tokenizer_type
    if kind is None and tokenizer.vocab_file is not None:
        draft.refuse("tokenizer", "vocab_file", "tokenizer_type should say what this file is")
    needs_vocab = kind in ("HFTokenizer", "GPT2BPETokenizer", "SPMTokenizer")
    if needs_vocab and tokenizer.vocab_file is None:
        draft.refuse("tokenizer", "tokenizer_type", "needs vocab_file beside it")
    if kind == "GPT2BPETokenizer" and tokenizer.merge_file is None:
        draft.refuse("tokenizer", "tokenizer_type", "needs merge_file beside it")
