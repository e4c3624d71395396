"""Reading a GPT-NeoX checkpoint (DeepSpeed's files) as a checkpoint of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron.config import Config, ModelConfig, load_config
from megatron.errors import CheckpointError, ConfigError, NeomixError
from megatron.exchange.architecture import choose_architecture
from megatron.exchange.importing import Imported, precision_of, write_checkpoint
from megatron.exchange.logits import TOLERANCE, compare, our_logits, sample_tokens
from megatron.exchange.neox_files import (
    NeoxOptions,
    NeoxWeights,
    checkpoint_folder,
    stored_parts,
)
from megatron.exchange.place import whole_folder
from megatron.exchange.reference import reference_logits
from megatron.exchange.tokenizer_files import open_tokenizer
from megatron.exchange.weights import Weights

_EMBEDDING = "word_embeddings.weight"
_DOWN = [f"mlp.{name}.weight" for name in ("dense_4h_to_h", "linear2", "w2")]
_STEP = re.compile(r"global_step(\d+)")


@dataclass(frozen=True, kw_only=True)
class NeoxSource:
    """What a command line says of a GPT-NeoX checkpoint.

    Attributes:
        given: its folder, or the one with ``latest``.
        step: which of several; None takes what ``latest`` names.
        config_files: the YAML that it was trained with; empty takes those kept in it.
        vocab_size: true token ids; None takes the configuration's, or all rows of the embedding.
        options: how the tensor ranks' parts are put together.
    """

    given: Path
    step: int | None = None
    config_files: Sequence[str] = ()
    vocab_size: int | None = None
    options: NeoxOptions = field(default_factory=NeoxOptions)


def import_deepspeed(
    source: NeoxSource, output: Path, *, tolerance: float = TOLERANCE, say: Callable[[str], None]
) -> None:
    """Write a GPT-NeoX checkpoint's model as a checkpoint that a run in any layout loads.

    Where transformers has a model like it, its logits are compared.

    Args:
        source: the checkpoint.
        output: a folder of checkpoints; must not be there.
        tolerance: largest relative difference of logits.
        say: takes a line for the console.

    Raises:
        CheckpointError: its files are not those of the configuration's model, or the logits differ.
        ConfigError: the configuration is wrong, or asks for what is not offered here.
        RunError: the disk refuses.
    """
    folder = checkpoint_folder(source.given, source.step)
    if folder is None:
        raise CheckpointError(f"{source.given} holds no DeepSpeed checkpoint")
    config = _configuration(folder, source)
    model = _sized(config, folder, source, say)
    weights = NeoxWeights(folder, model, source.options)
    say(f"reading {folder}, of GPT-NeoX on {weights.ranks} tensor ranks")

    def check(back: Weights) -> None:
        try:
            architecture = choose_architecture(model)
        except ConfigError:
            say("note: transformers has no model like it; no logits were compared")
            return
        tokens = sample_tokens(model)
        theirs = reference_logits(model, architecture, weights, tokens)
        found = compare(
            our_logits(model, back, tokens), theirs, bound=tolerance, what=f"{output} and {folder}"
        )
        say(
            f"logits agree with {architecture.class_name} within {found.difference:.1e} of the "
            f"largest one, on {found.tokens} random tokens"
        )

    named = _STEP.fullmatch(folder.name)
    tokenizer = config.tokenizer.model_dump(exclude_none=True)
    with whole_folder(output) as partial:
        write_checkpoint(
            Imported(
                model=model,
                weights=weights,
                origin=f"GPT-NeoX checkpoint {folder}",
                step=int(named.group(1)) if named else 0,
                precision=precision_of(stored_parts(folder, 0, [_EMBEDDING])[0].dtype),
                tokenizer=tokenizer,
            ),
            partial,
            output.absolute(),
            check=check,
        )


def _configuration(folder: Path, source: NeoxSource) -> Config:
    files = list(source.config_files)
    if not files:
        kept = sorted((folder / "configs").glob("*.yml")) or sorted(
            (folder.parent / "configs").glob("*.yml")
        )
        files = [str(file) for file in kept]
    if not files:
        raise CheckpointError(
            f"{folder} has no configs/*.yml that say what the model is; name the YAML that it was "
            "trained with: --config_file"
        )
    given = _given_keys(files)
    overrides = []
    if "train_iters" not in given and "train_epochs" not in given:
        overrides.append("train_iters=1")
    if not given & {"train_micro_batch_size_per_gpu", "batch_size", "train_batch_size"}:
        overrides.append("train_micro_batch_size_per_gpu=1")
    if not given & {"optimizer", "lr"}:
        overrides.append("optimizer.params.lr=0.0001")
    if not given & {"data_path", "train_data_paths", "domains"}:
        overrides.append("domains={none: {train: none}}")
    return load_config(files, overrides=overrides)


def _given_keys(files: Sequence[str]) -> set[str]:
    keys: set[str] = set()
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
        keys |= {str(key).replace("-", "_") for key in content}
    return keys


def _sized(
    config: Config, folder: Path, source: NeoxSource, say: Callable[[str], None]
) -> ModelConfig:
    """Return the model with the sizes that the files have: token ids, width of the MLP.

    A gated MLP's width is counted in other ways by other versions; the files do not lie.
    """
    model = config.model
    if model.moe_num_experts > 1:
        raise CheckpointError(
            f"{folder} has moe_num_experts: {model.moe_num_experts}; GPT-NeoX's files of experts "
            "are not read, but Mixtral's in a Hugging Face folder are"
        )
    rows = sum(int(part.shape[0]) for part in stored_parts(folder, 0, [_EMBEDDING]))
    size = source.vocab_size or model.vocab_size or _tokenizer_size(config)
    if size is None:
        size = rows
        say(
            f"note: the embedding's {rows} rows are all kept as token ids, padding included; "
            "--vocab_size names the true number"
        )
    if size > rows:
        raise CheckpointError(
            f"{folder} has {rows} rows of the embedding, fewer than vocab_size {size}"
        )
    width = sum(int(part.shape[1]) for part in stored_parts(folder, 2, _DOWN))
    return model.model_copy(update={"vocab_size": size, "intermediate_size": width})


def _tokenizer_size(config: Config) -> int | None:
    try:
        tokenizer = open_tokenizer(config.tokenizer)
    except NeomixError:
        return None
    return None if tokenizer is None else tokenizer.vocab_size
