"""Reading a Hugging Face folder as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError
from megatron.exchange.hf_config import architecture_of, model_config, model_keys, read_config
from megatron.exchange.hints import original_model, read_hints
from megatron.exchange.importing import Imported, precision_of, write_checkpoint
from megatron.exchange.logits import (
    TOLERANCE,
    Comparison,
    compare,
    our_logits,
    sample_tokens,
    their_logits,
)
from megatron.exchange.pieces import pieces
from megatron.exchange.place import whole_folder
from megatron.exchange.shards import FolderTensors, FolderWeights
from megatron.exchange.tokenizer_files import check_tokenizer, copy_tokenizer
from megatron.exchange.weights import Weights, parameters, true_shape
from megatron.tokenizer import build_tokenizer


def is_hugging_face(folder: Path) -> bool:
    """Tell whether a folder is a Hugging Face model."""
    return (folder / "config.json").is_file()


def import_hugging_face(
    source: Path,
    output: Path,
    *,
    step: int | None = None,
    tokenizer: bool = True,
    tolerance: float = TOLERANCE,
    say: Callable[[str], None],
) -> Comparison:
    """Write a Hugging Face folder's model as a checkpoint that a run in any layout loads.

    Args:
        source: a local folder with ``config.json``.
        output: a folder of checkpoints; must not be there.
        step: training steps that the model has had; None takes what an export of ours says, or 0.
        tokenizer: whether the tokenizer goes with it.
        tolerance: largest relative difference of logits.
        say: takes a line for the console.

    Raises:
        CheckpointError: the model is none that we compute, or the logits differ.
        RunError: the disk refuses.
    """
    config, hints = read_config(source), read_hints(source)
    architecture, keys = architecture_of(config), model_keys(config, source)
    original = original_model(hints, keys, architecture, source)
    if hints and original is None:
        say(f"note: {source} says that it came from here, but its model is another one by now")
        hints = {}
    model = original or model_config(keys, source)
    tensors, parts = FolderTensors(source), pieces(model, architecture)
    shapes = {name: true_shape(one) for name, one in parameters(model).items()}
    weights = FolderWeights(tensors, parts, shapes)
    say(f"reading {source}, a model of type {config.model_type}")
    compared: list[Comparison] = []

    def check(back: Weights) -> None:
        tokens = sample_tokens(model)
        ours, theirs = our_logits(model, back, tokens), their_logits(source, tokens)
        compared.append(compare(ours, theirs, bound=tolerance, what=f"{output} and {source}"))

    with whole_folder(output) as folder:
        named = _tokenizer(source, folder / "tokenizer", say) if tokenizer else {}
        write_checkpoint(
            Imported(
                model=model,
                weights=weights,
                origin=f"{config.model_type} of {source}",
                step=int(hints.get("step", 0)) if step is None else step,
                precision=precision_of(weights.read(parts[0].ours or "").dtype),
                tokenizer=named,
            ),
            folder,
            output.absolute(),
            check=check,
        )
    say(
        f"logits agree within {compared[0].difference:.1e} of the largest one, on "
        f"{compared[0].tokens} random tokens"
    )
    return compared[0]


def _tokenizer(source: Path, target: Path, say: Callable[[str], None]) -> dict[str, Any]:
    named = copy_tokenizer(source, target)
    if not named:
        say(f"note: {source} holds no tokenizer that a run can use; name one in the configuration")
        return {}
    files = [str(target / named[k]) if k in named else None for k in ("vocab_file", "merge_file")]
    try:
        check_tokenizer(target, build_tokenizer(named["tokenizer_type"], *files, fast=False))
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {source} cannot be taken over: {error}") from error
    return named
