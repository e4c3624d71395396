"""A checkpoint of ours that is to be written in another program's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.manifest import Manifest
from megatron.config import ModelConfig, TokenizerConfig, load_config
from megatron.errors import CheckpointError
from megatron.training.compatible import check_same_model, facts_of
from megatron.training.convert import choose
from megatron.training.reference_checkpoint import recorded_config


@dataclass(frozen=True, kw_only=True)
class Source:
    """A verified checkpoint and what it is of.

    Attributes:
        path: its folder.
        manifest: what it holds.
        model: of the run that wrote it, with ``vocab_size``.
        tokenizer: of that run.
    """

    path: Path
    manifest: Manifest
    model: ModelConfig
    tokenizer: TokenizerConfig


def find_source(
    given: Path,
    *,
    step: int | None,
    config_files: list[str] | None = None,
    say: Callable[[str], None],
) -> Source:
    """Return the checkpoint that a command line names; every byte of it is verified.

    Args:
        given: a run's folder, its folder of checkpoints, or one checkpoint's folder.
        step: of the checkpoint; None takes the newest.
        config_files: configuration of the run, where its own record is not beside it.
        say: told of checkpoints that are passed over.

    Raises:
        CheckpointError: there is none, or its run's configuration is not with it or differs.
    """
    path, manifest = choose(given, step, verified=True, say=say)
    found = load_config(config_files) if config_files else None
    config = found or recorded_config(given, path, "--input")
    model = config.model
    if model.vocab_size is None:
        known = manifest.extra.get("model", {}).get("vocab_size")
        if known is None:
            raise CheckpointError(f"{path}: vocab_size is nowhere said; add it to --config_file")
        model = model.model_copy(update={"vocab_size": known})
    check_same_model(manifest, facts_of(model))
    return Source(path=path, manifest=manifest, model=model, tokenizer=config.tokenizer)
