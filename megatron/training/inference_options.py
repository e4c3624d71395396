"""What a run's options say of evaluation and generation, checked before anything starts.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config, resolve_batch
from megatron.config.evaluation import GenerationConfig
from megatron.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.training.compatible import check_same_model, model_facts
from megatron.training.convert import choose
from megatron.training.layout import frozen_layout
from megatron.training.reference_checkpoint import (
    ReferenceCheckpoint,
    check_loadable,
    recorded_config,
)
from megatron.training.summary import check_device

Say = Callable[[str], None]


def run_tokenizer(config: Config, purpose: str) -> Tokenizer:
    """Open the run's tokenizer.

    Raises:
        ConfigError: the configuration names none.
    """
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type is None:
        raise ConfigError(
            f"tokenizer_type: {purpose} needs the tokenizer that made the data; give "
            "tokenizer_type and vocab_file"
        )
    return build_tokenizer(tokenizer.tokenizer_type, tokenizer.vocab_file, tokenizer.merge_file)


def check_tasks(config: Config) -> None:
    """Check at once what an evaluation by tasks needs; nothing is imported.

    Raises:
        ConfigError: there is no tokenizer.
        MissingExtraError: lm-eval is not installed.
    """
    if not config.evaluation.eval_tasks:
        return
    if config.tokenizer.tokenizer_type is None:
        run_tokenizer(config, "eval_tasks")
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "eval_tasks")


def check_evaluation(config: Config) -> None:
    """Check that something is to be measured.

    Raises:
        ConfigError: nothing is.
    """
    evaluation = config.evaluation
    if not evaluation.eval_tasks and evaluation.eval_perplexity is None:
        raise ConfigError(
            "eval_tasks: nothing is to be measured; give --eval_tasks TASK …, or "
            "--eval_perplexity valid for the loss of every domain"
        )


def check_generation(config: Config) -> None:
    """Check what is asked for.

    Raises:
        ConfigError: the kind of generation is not said.
        DataError: the file of prompts cannot be read, or holds none.
    """
    options = config.generation
    if options.text_gen_type is None:
        raise ConfigError(
            "text_gen_type: say where prompts come from: unconditional, input-file or interactive"
        )
    if options.text_gen_type == "input-file":
        read_prompts(options)


def read_prompts(options: GenerationConfig) -> list[str]:
    """Return the prompts of the input file.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    path = Path(options.sample_input_file or "")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"sample_input_file: {path} cannot be read: {error}") from error
    prompts = split_prompts(text, options.prompt_end)
    if not prompts:
        raise DataError(f"sample_input_file: {path} holds no prompt")
    return prompts


def split_prompts(text: str, end: str) -> list[str]:
    """Return the prompts of a file; spaces around each, and empty ones, do not count."""
    return [prompt for part in text.split(end) if (prompt := part.strip())]


def find_model(
    config: Config, *, step: int | None, verified: bool, say: Say
) -> ReferenceCheckpoint:
    """Return the checkpoint that is looked at: of the run itself, or else of ``load``.

    Args:
        config: of the run.
        step: of the checkpoint; None takes the newest.
        verified: read and compare every byte of it; otherwise only its manifest is read.
        say: told of checkpoints that are passed over.

    Raises:
        CheckpointError: there is none, or it is of another model than the configuration's.
    """
    own, load = Path(config.checkpoint.save_dir), config.checkpoint.load
    folder = own if load is None or CheckpointStore(own).steps() else Path(load)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint to look at: {folder} is no folder; train the run first, or "
            "name its checkpoints with save or load"
        )
    path, manifest = choose(folder, step, verified=verified, say=say)
    check_loadable(path, manifest, "checkpoint")
    found = recorded_config(folder, path, "checkpoint")
    size = {"vocab_size": config.model.vocab_size or found.model.vocab_size}
    asked = config.model_copy(update={"model": config.model.model_copy(update=size)})
    check_same_model(manifest, model_facts(asked))
    return ReferenceCheckpoint(path=path, manifest=manifest, config=found)


def saved_steps(config: Config) -> list[int]:
    """Return the steps of the run's checkpoints, or else of those in ``load``."""
    own, load = config.checkpoint.save_dir, config.checkpoint.load
    steps = CheckpointStore(own).steps()
    return steps if steps or load is None else CheckpointStore(load).steps()


def preflight_inference(config: Config, *, world_size: int, gpus: int, script: str) -> None:
    """Refuse in the starting process what every rank would refuse.

    Args:
        config: the loaded configuration.
        world_size: ranks of the job.
        gpus: GPUs of this node; 0 means a CPU run.
        script: ``evaluate.py`` or ``generate.py``.

    Raises:
        NeomixError: the first thing that the ranks would stop at.
    """
    resolve_batch(config.batch, frozen_layout(config, world_size).data_size)
    check_device(config, on_cpu=gpus == 0)
    if script == "generate.py":
        check_generation(config)
        run_tokenizer(config, "generation")
    else:
        check_evaluation(config)
        check_tasks(config)
    find_model(config, step=config.checkpoint.iteration, verified=False, say=lambda text: None)
