"""``tools/convert_checkpoint.py``: find a checkpoint, describe it, write its universal form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.checkpoint.bundle import read_bundle
from megatron.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron.checkpoint.store import CheckpointStore, parse_tag
from megatron.checkpoint.verify import summary
from megatron.config.model import ModelConfig
from megatron.errors import CheckpointError
from megatron.model.accounting import parameter_count
from megatron.training.compatible import IMPORTED
from megatron.training.conversion import is_universal, write_universal


def choose(
    given: Path, step: int | None, *, verified: bool, say: Callable[[str], None]
) -> tuple[Path, Manifest]:
    """Return the checkpoint that a command line names.

    Args:
        given: a run folder, a folder of checkpoints, or one checkpoint's folder.
        step: its step; None takes the newest.
        verified: read and compare every byte of it; otherwise only its manifest is read.
        say: told of checkpoints that are passed over.

    Raises:
        CheckpointError: there is none, or it is incomplete or damaged.
    """
    directory, step = _locate(given, step)
    store = CheckpointStore(directory)
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{given} holds no checkpoint: give a run's folder, its folder of checkpoints, or one "
            "checkpoint (a folder named global_step and a number)"
        )
    if step is None and verified:
        newest = store.newest_valid(report=say)
        if newest is None:
            raise CheckpointError(f"no checkpoint in {directory} is complete and undamaged")
        return newest
    step = steps[-1] if step is None else step
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; it has {known}")
    path = store.path(step)
    try:
        manifest = store.read_manifest(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is incomplete or damaged: {error}") from error
    if verified and (problems := store.verify(path)):
        raise CheckpointError(f"{path} is incomplete or damaged: {summary(problems)}")
    return path, manifest


def describe(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield lines that say what a checkpoint holds."""
    layout, extra = manifest.layout, manifest.extra
    form = "universal format, written by" if is_universal(manifest) else "layout"
    size = f"{len(manifest.files)} files, {manifest.total_bytes:,} bytes"
    yield f"{path}: step {manifest.step}, {size}"
    yield (
        f"{form}: tensor {layout.get('tensor_size', 1)} × pipeline {layout.get('pipe_size', 1)} × "
        f"data {layout.get('data_size', '?')}, ZeRO stage {layout.get('zero_stage', '?')}, "
        f"{layout.get('precision', '?')}"
    )
    if "model" in extra:
        # Without what the manifest leaves out, and without padding: the model's own numbers.
        model = ModelConfig.model_construct(**extra["model"], make_vocab_size_divisible_by=1)
        yield (
            f"model: {parameter_count(model):,} parameters, {model.num_layers} layers of "
            f"{model.hidden_size}, vocabulary {model.vocab_size}"
        )
    if IMPORTED in extra:
        yield f"weights alone, from {extra[IMPORTED]}; start from them with finetune: true"
    else:
        yield f"domains: {', '.join(read_bundle(path)['domains'])}"
    versions = [f"{name} {extra[name]}" for name in ("torch", "deepspeed") if name in extra]
    if versions:
        yield f"written with {', '.join(versions)}"


def convert(
    given: Path, output: Path, *, step: int | None, workers: int, say: Callable[[str], None]
) -> Path:
    """Write the universal form of a checkpoint into a folder of checkpoints of its own.

    Args:
        given: as for :func:`choose`.
        output: folder for the universal form, which ``load`` then names.
        step: as for :func:`choose`.
        workers: processes that convert.
        say: takes a line for the console.

    Returns:
        The checkpoint's new folder.

    Raises:
        CheckpointError: there is nothing to convert, or the output holds that step already.
        RunError: the disk is full or refuses.
    """
    path, manifest = choose(given, step, verified=True, say=say)
    if is_universal(manifest):
        raise CheckpointError(
            f"{path} is in the universal format already; a run starts from it with load: "
            f"{path.parent} and load_universal: true"
        )
    store = CheckpointStore(output)
    target = store.path(manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} is there already; give another --output, or remove it")
    say(f"converting {path}")
    return write_universal(path, manifest, store, workers=workers)


def _locate(given: Path, step: int | None) -> tuple[Path, int | None]:
    """Return the folder of checkpoints that ``given`` means, and the step if it names one."""
    if not given.is_dir():
        raise CheckpointError(f"{given} is no folder; give a run's folder or a checkpoint's")
    try:
        named, kind = parse_tag(given.absolute().name)
    except CheckpointError:
        inner = given / "checkpoints"
        return (inner if inner.is_dir() else given), step
    if kind:
        raise CheckpointError(
            f"{given} belongs to the checkpoint beside it; give {given.with_suffix('')}"
        )
    if not (given / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{given} is incomplete: {MANIFEST_NAME} is missing")
    if step is not None and step != named:
        raise CheckpointError(f"--step {step} contradicts the folder {given}")
    return given.absolute().parent, named
