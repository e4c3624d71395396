"""The checkpoint that a reference model is loaded from, and whether it fits.  No torch in here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.manifest import Manifest
from megatron.config import Config, load_config
from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.earlier_run import how_to_make
from megatron.training.compatible import IMPORTED, check_same_model, model_facts
from megatron.training.conversion import source_hashes
from megatron.training.convert import choose

_CONFIG_NAME = "config.yml"


@dataclass(frozen=True, kw_only=True)
class ReferenceCheckpoint:
    """A model that was trained before.

    Attributes:
        path: folder of the checkpoint.
        manifest: what it holds.
        config: of the run that wrote it, with ``model.vocab_size`` filled in.
    """

    path: Path
    manifest: Manifest
    config: Config

    @property
    def identity(self) -> str:
        """A hash of the model: the same for a checkpoint and its universal form."""
        source = self.manifest.extra.get("source") or source_hashes(self.manifest)
        facts = {
            "model": self.manifest.extra.get("model"),
            "step": self.manifest.step,
            "files": dict(source),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_reference(
    given: str | Path,
    *,
    step: int | None = None,
    verified: bool,
    say: Callable[[str], None],
    name: str = "mixing.reference",
) -> ReferenceCheckpoint:
    """Return the checkpoint that a configuration or a command line names.

    Args:
        given: a run's folder, its folder of checkpoints, or one checkpoint's folder.
        step: of the checkpoint; None takes the newest.
        verified: read and compare every byte of it; otherwise only its manifest is read.
        say: told of checkpoints that are passed over.
        name: of the option, for messages.

    Raises:
        CheckpointError: there is none that is complete, or its run's configuration is not with
            it; with the command that makes it.
    """
    folder = Path(given)
    try:
        path, manifest = choose(folder, step, verified=verified, say=say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name}: no reference model in {folder} ({error}); "
            f"{how_to_make(folder / _CONFIG_NAME)}"
        ) from error
    if manifest.step == 0 and IMPORTED not in manifest.extra:
        raise CheckpointError(
            f"{name}: {path} is of step 0, of a model that has learnt nothing; "
            "give a checkpoint of a later step"
        )
    check_loadable(path, manifest, name)
    config = recorded_config(folder, path, name)
    check_same_model(manifest, model_facts(config))
    return ReferenceCheckpoint(path=path, manifest=manifest, config=config)


def check_loadable(path: Path, manifest: Manifest, name: str) -> None:
    """Check that other layouts can load a checkpoint.

    Raises:
        CheckpointError: they cannot.
    """
    if manifest.layout.get("zero_stage") == 0:
        raise CheckpointError(
            f"{name}: {path} was written under ZeRO stage 0 (forced by deepspeed_extra_args), "
            "whose checkpoints only their own layout can load; train under stage 1"
        )


def recorded_config(given: Path, path: Path, name: str) -> Config:
    """Return the configuration of the run that wrote a checkpoint, as it lies beside it.

    Args:
        given: what the command line or the configuration named.
        path: the checkpoint's folder.
        name: of the option, for messages.

    Raises:
        CheckpointError: it is not there, or is not a run's own record.
    """
    folders = dict.fromkeys((given, path.parent.parent, path.parent))
    for folder in folders:
        file = folder / _CONFIG_NAME
        if file.is_file():
            config = load_config([str(file)])
            if config.model.vocab_size is None:
                raise CheckpointError(f"{file} has no vocab_size; it is not a run's own record")
            return config
    looked = ", ".join(map(str, folders))
    raise CheckpointError(
        f"{name}: the {_CONFIG_NAME} of the run that wrote {path} is in none of {looked}; it says "
        "what the model is: put the file back, or give the run's folder"
    )


def check_reference(reference: ReferenceCheckpoint, config: Config) -> None:
    """Check that a reference model reads what the run reads, and that its layout can hold it.

    Its size may be another.

    Args:
        reference: the checkpoint.
        config: of the run, with ``model.vocab_size`` filled in.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    theirs, own = reference.config.model, config.model
    pairs = [
        ("vocab_size", theirs.vocab_size, own.vocab_size),
        ("seq_length", theirs.context_length, own.context_length),
        *_tokenizers(reference.config, config),
    ]
    different = [
        f"{name} (reference {one!r}, run {other!r})" for name, one, other in pairs if one != other
    ]
    if different:
        raise ConfigError(
            f"the reference model {reference.path} reads other tokens than the run: "
            f"{', '.join(different)}; give a reference with the run's values, or change the run's"
        )
    parallel = config.parallel
    ranks = parallel.model_parallel_size
    for name, value in (
        ("num_attention_heads", theirs.num_attention_heads),
        ("num_kv_heads", theirs.num_kv_heads),
        ("intermediate_size", theirs.intermediate_size),
    ):
        if value is not None and value % ranks:
            raise ConfigError(
                f"model_parallel_size: {ranks} does not divide the reference model's {name} "
                f"({value}); use one that does, or a loss store, which works in any layout"
            )
    if parallel.stages > theirs.num_layers:
        raise ConfigError(
            f"pipe_parallel_size: {parallel.stages} is above the reference model's num_layers "
            f"({theirs.num_layers}); use fewer stages, or a loss store, which works in any layout"
        )


def _tokenizers(one: Config, other: Config) -> list[tuple[str, object, object]]:
    """Return what tells the two tokenizers apart, as far as both are known."""
    pairs: list[tuple[str, object, object]] = []
    kinds = one.tokenizer.tokenizer_type, other.tokenizer.tokenizer_type
    if None not in kinds:
        pairs.append(("tokenizer_type", *kinds))
    files = [
        Path(given) if given is not None and Path(given).is_file() else None
        for given in (one.tokenizer.vocab_file, other.tokenizer.vocab_file)
    ]
    if files[0] is not None and files[1] is not None:
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file]
        if hashes[0] != hashes[1]:
            pairs.append(("vocab_file", str(files[0]), f"{files[1]}, of other content"))
    return pairs
