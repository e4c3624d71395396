"""What decides LESS's scores, and the flags that say it.  No torch in here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from megatron.errors import ConfigError
from megatron.selection.flags import positive

TYPES: Final = ("adam", "sgd", "sign")


@dataclass(frozen=True, kw_only=True)
class LessSettings:
    """All that decides LESS's scores beside model, corpus and targets.

    Attributes:
        rank: of the adapters.
        alpha: of the adapters.
        dropout: of the adapters, in the warm-up.
        lora_targets: names of the modules that get adapters; () for attention's.
        warmup_share: of the documents that the warm-up trains on.
        epochs: of the warm-up, each of which leaves a checkpoint.
        warmup_batch: documents of a step.
        rate: largest learning rate.
        dimension: of the projection.
        gradient_type: ``adam``, ``sgd`` or ``sign``: what is made of documents' gradients.
        max_tokens: of a document or an example; what is beyond is not read.
        seed: of everything that is drawn.
        dtype: of the model's own weights; adapters, gradients and projections are float32.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    lora_targets: tuple[str, ...] = ()
    warmup_share: float = 0.05
    epochs: int = 4
    warmup_batch: int = 32
    rate: float = 2e-5
    dimension: int = 8192
    gradient_type: str = "adam"
    max_tokens: int = 2048
    seed: int = 0
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        checks = (
            (0 < self.warmup_share <= 1, "--warmup-share", self.warmup_share, "above 0, at most 1"),
            (0 <= self.dropout < 1, "--lora-dropout", self.dropout, "from 0 to below 1"),
            (self.alpha > 0, "--lora-alpha", self.alpha, "above 0"),
            (self.rate > 0, "--learning-rate", self.rate, "above 0"),
            (self.max_tokens > 1, "--max-tokens", self.max_tokens, "2 or more"),
            (
                self.gradient_type in TYPES,
                "--gradient-type",
                self.gradient_type,
                f"one of {', '.join(TYPES)}",
            ),
        )
        for sound, flag, value, wanted in checks:
            if not sound:
                raise ConfigError(f"{flag} {value}: must be {wanted}")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :class:`LessSettings`."""
    known = LessSettings()
    flags: tuple[tuple[str, str, Callable[[str], object], str, str], ...] = (
        ("--lora-rank", "rank", positive, "N", "columns of an adapter's matrices"),
        ("--lora-alpha", "alpha", float, "X", "an adapter's update is multiplied with this / rank"),
        ("--lora-dropout", "dropout", float, "P", "of an adapter's input, in the warm-up"),
        ("--warmup-share", "warmup_share", float, "S", "of the documents, for the warm-up"),
        ("--epochs", "epochs", positive, "N", "of the warm-up; each leaves a checkpoint"),
        ("--warmup-batch", "warmup_batch", positive, "N", "documents of a step of the warm-up"),
        ("--learning-rate", "rate", float, "X", "largest of the warm-up"),
        ("--dimension", "dimension", positive, "N", "numbers that a gradient is projected to"),
        ("--max-tokens", "max_tokens", positive, "N", "of a document; the rest is not read"),
        ("--seed", "seed", int, "N", "of the sample, its order, the adapters and the projection"),
    )
    for flag, name, kind, metavar, text in flags:
        default = getattr(known, name)
        parser.add_argument(flag, type=kind, default=default, metavar=metavar,
            help=f"{text} (default: {default})")  # fmt: skip
    parser.add_argument("--lora-targets", nargs="+", default=(), metavar="NAME",
        help="modules that get adapters (default: those of attention)")  # fmt: skip
    parser.add_argument("--gradient-type", choices=TYPES, default=known.gradient_type,
        help="what is made of a document's gradient: Adam's update, nothing, its signs "
        "(default: adam)")  # fmt: skip


def settings_of(options: argparse.Namespace) -> LessSettings:
    """Return what was given.

    Raises:
        ConfigError: a value cannot be, naming the flag.
    """
    return LessSettings(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        lora_targets=tuple(options.lora_targets),
        warmup_share=options.warmup_share,
        epochs=options.epochs,
        warmup_batch=options.warmup_batch,
        rate=options.learning_rate,
        dimension=options.dimension,
        gradient_type=options.gradient_type,
        max_tokens=options.max_tokens,
        seed=options.seed,
        dtype=options.dtype,
    )
