"""DeepSpeed's universal format: a checkpoint by whole parameters, which any layout can load.

Writing it is DeepSpeed's own conversion, told by :func:`universal_info` how tensor ranks divide
each parameter; reading it is :mod:`megatron.engine.universal_load`.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from megatron.parallel.partition import Partition

OPTIMIZER_STATE = "zero/optimizer_state.pt"
"""Loss scale and hyperparameters in a universal checkpoint; parameters have folders beside it."""

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
"""State of Adam's kinds, the only one that DeepSpeed's conversion knows."""

_BASE_STATE = "base_optimizer_state"
_TIED = r"tied_modules\."


def universal_info(parameters: Mapping[str, nn.Parameter], vocab_size: int) -> dict[str, Any]:
    """Return what a checkpoint's client state must carry to be convertible.

    It names how tensor-parallel parts are put together again, by patterns that stand for all
    blocks at once (the conversion compares every pattern with every parameter).

    Args:
        parameters: of the whole model, undivided, by global name, each with its ``partition``
            (see :mod:`megatron.parallel.parameters`); on any device.
        vocab_size: token ids, before padding.
    """
    vocabulary: set[str] = set()
    replicated: set[str] = set()
    rows: set[str] = set()
    fused: dict[tuple[tuple[int, ...], tuple[int, ...], int], set[str]] = {}
    for name, parameter in parameters.items():
        pattern = _pattern(name)
        partition: Partition | None = getattr(parameter, "partition", None)
        if partition is None:
            replicated.add(pattern)
        elif len(partition.blocks) > 1:
            key = (partition.blocks, tuple(parameter.shape), partition.dim)
            fused.setdefault(key, set()).add(pattern)
        elif partition.padded_from is not None:
            vocabulary.add(pattern)
        elif partition.dim == 1:
            rows.add(pattern)
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": vocab_size,
        "vocabulary_parameter_patterns": sorted(vocabulary),
        "tp_replicated_parameter_patterns": sorted(replicated),
        "parameter_to_average_patterns": [],
        "parameter_with_row_parallelism_patterns": sorted(rows),
        # The last stage holds the first one's tied weights once more.
        "pipeline_replicated_parameter_patterns": [_TIED],
        "parameter_with_2_sub_params_cat_dim_0": [],
        "parameter_with_sub_params": [
            {
                "patterns": sorted(patterns),
                "shape": (*shape[:dim], blocks, *shape[dim + 1 :]),
                "partition_dim": dim,
            }
            for (blocks, shape, dim), patterns in sorted(fused.items())
        ],
    }


def _pattern(name: str) -> str:
    """Return the pattern of a parameter and its like in all other blocks and experts."""
    numbers = r"(?:(?<=^)|(?<=\.experts\\\.))\d+(?=\\\.)"
    return re.sub(numbers, lambda _: r"\d+", re.escape(name)) + "$"


def check_convertible(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a checkpoint of one layout can be taken up by another.

    Args:
        saved: layout of the checkpoint, see ``megatron.training.compatible.layout_facts``.
        wanted: layout of the run.

    Raises:
        CheckpointError: one of them is ZeRO stage 0, which has no universal format.
    """
    if 0 in (saved.get("zero_stage"), wanted["zero_stage"]):
        raise CheckpointError(
            "the checkpoint's layout is not the run's, and one of the two is ZeRO stage 0 (forced "
            "by deepspeed_extra_args), which DeepSpeed's universal format does not know; resume "
            "with the layout that wrote it, or start in another run_dir with stage 1"
        )


def convert_to_universal(
    source: Path, target: Path, *, workers: int = 1, state: Sequence[str] = ADAM_STATE
) -> None:
    """Write the universal form of the DeepSpeed checkpoint ``source`` into ``target``.

    With one worker no more than one rank's part of the state, or one parameter, is in memory.

    Args:
        source: folder of the checkpoint.
        target: folder to write into; made if it is not there.
        workers: processes, each of which needs that memory.
        state: names of the optimizer's elementwise tensors; ``step`` among them where it counts.

    Raises:
        CheckpointError: DeepSpeed could not convert it; its own message is quoted.
        OSError: the disk refuses.
    """
    from megatron.engine.frozen_weights import add_frozen

    target.mkdir(parents=True, exist_ok=True)
    if not any(source.glob("*_optim_states.pt")):
        # Saved without its optimizer: the weights are all there is.
        add_frozen(source, target, everything=True)
        return
    if set(state) == set(ADAM_STATE):
        _convert(source, target, workers)
    else:
        _convert_in_passes(source, target, workers, [name for name in state if name != "step"])
    _keep_common_state(target / OPTIMIZER_STATE)
    add_frozen(source, target)


def _convert(source: Path, target: Path, workers: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    chatter = io.StringIO()
    try:
        with (
            plain_path(source) as plain_source,
            plain_path(target) as plain_target,
            contextlib.redirect_stdout(chatter),
            contextlib.redirect_stderr(chatter),
        ):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(plain_source),
                    output_folder=str(plain_target),
                    num_extract_workers=workers,
                    num_merge_workers=workers,
                    keep_temp_folder=False,
                    strict=False,  # patterns of what is frozen match none that it knows
                    inject_missing_state=False,
                )
            )
    except (RuntimeError, AssertionError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"cannot convert {source} to the universal format: {type(error).__name__}: {error}; "
            "resume with the layout that wrote it, or start in another run_dir"
        ) from error


def _convert_in_passes(source: Path, target: Path, workers: int, names: list[str]) -> None:
    """Convert the state of another optimizer under the names of Adam's, two tensors at a time."""
    pairs = [names[first : first + 2] for first in range(0, len(names), 2)] or [[]]
    for number, pair in enumerate(pairs):
        with tempfile.TemporaryDirectory(prefix="state-", dir=target.parent) as place:
            disguised, converted = Path(place) / "source", Path(place) / "target"
            disguise(source, disguised, pair)
            converted.mkdir()
            _convert(disguised, converted, workers)
            _take(converted, target, pair, everything=number == 0)


def _take(converted: Path, target: Path, pair: Sequence[str], *, everything: bool) -> None:
    """Move what was converted into the target, state tensors under their own names."""
    own = {f"{adams}.pt": f"{name}.pt" for adams, name in zip(ADAM_STATE, pair, strict=False)}
    adams_files = {f"{name}.pt" for name in ADAM_STATE[:2]}
    for file in sorted(path for path in converted.rglob("*") if path.is_file()):
        if file.name in adams_files and file.name not in own:
            continue
        if not everything and file.name not in own:
            continue
        to = target / file.relative_to(converted).with_name(own.get(file.name, file.name))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, to)


def disguise(source: Path, target: Path, pair: Sequence[str]) -> None:
    """Write a checkpoint whose optimizer looks like Adam, as DeepSpeed's conversion wants it.

    Args:
        source: folder of the checkpoint.
        target: folder to make; files without optimizer state are links.
        pair: state tensors that stand in for ``exp_avg`` and ``exp_avg_sq``; where there are
            fewer than two, zeros do.
    """
    import torch

    target.mkdir()
    for file in source.iterdir():
        if not file.name.endswith("_optim_states.pt"):
            (target / file.name).symlink_to(file.absolute())
            continue
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
        outer = content["optimizer_state_dict"]
        flat = outer.get("fp32_flat_groups", outer.get("single_partition_of_fp32_groups"))
        inner = outer["optimizer_state_dict" if "fp32_flat_groups" in outer else _BASE_STATE]
        held = inner["state"]
        inner["state"] = {
            index: _as_adam(held.get(index, {}), weights, pair)
            for index, weights in enumerate(flat)
        }
        torch.save(content, target / file.name)


def _as_adam(held: Mapping[str, Any], weights: Any, pair: Sequence[str]) -> dict[str, Any]:
    import torch

    tensors = [held.get(name) for name in pair] + [None] * (2 - len(pair))
    filled = [torch.zeros_like(weights) if one is None else one for one in tensors]
    step = held.get("step", torch.tensor(0.0))
    return dict(zip(ADAM_STATE, (*filled, step), strict=True))


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield another path of a folder, with nothing special in it.

    DeepSpeed looks for files by patterns that begin with the folder's name, and finds none where
    that holds a bracket or a plus sign.
    """
    with tempfile.TemporaryDirectory(prefix="neomix-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def _keep_common_state(file: Path) -> None:
    """Drop rank 0's part of the state from the common file: under ZeRO 3 it is left in it."""
    import torch

    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    inner = state.get("optimizer_state_dict")
    if inner is None:
        return
    steps = {
        index: {"step": own["step"].clone() if torch.is_tensor(own["step"]) else own["step"]}
        for index, own in inner["state"].items()
        if "step" in own
    }
    kept = {key: value for key, value in state.items() if key != "fp32_flat_groups"}
    kept["optimizer_state_dict"] = {**inner, "state": steps}
    torch.save(kept, file)
