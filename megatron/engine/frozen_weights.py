"""What is not trained, in the universal format.

DeepSpeed's conversion (0.19.8) takes parameters from the optimizer's state, and those that have
none from the first rank's file, as if that held all of them.  Here they are put together from the
files of every tensor rank and layer, by the same patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.errors import CheckpointError
from megatron.parallel.partition import Partition

_INFO = "universal_checkpoint_info"
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_TIED = "tied_modules"


def add_frozen(source: Path, target: Path, *, everything: bool = False) -> None:
    """Write the parameters that are not trained, float32, beside those that are.

    Args:
        source: folder of the checkpoint, vetted.
        target: folder of its universal form.
        everything: write those that are trained, too: the checkpoint has no optimizer's state.

    Raises:
        CheckpointError: the tensor ranks' parts do not make up a parameter.
    """
    heads = [_load(path) for path in source.glob("mp_rank_*_model_states.pt")]
    trained = {name for head in heads for group in head.get("param_shapes") or () for name in group}
    trained = set() if everything else trained
    info: Mapping[str, Any] = heads[0].get(_INFO, {}) if heads else {}
    tied = any(_TIED in pattern for pattern in info.get("vocabulary_parameter_patterns", ()))
    for names in _files(source, tied=tied):
        ranks = sorted(names)
        for name in names[ranks[0]].keys() - trained:
            whole = _join(name, [names[rank][name] for rank in ranks], info, source)
            file = target / "zero" / name / "fp32.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"param": whole.to(torch.float32, copy=True).contiguous()}, file)


def _files(source: Path, *, tied: bool) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """Yield by tensor rank the tensors of the model's files, a layer at a time in a pipeline."""
    layers: dict[int, dict[int, Path]] = {}
    for path in sorted(source.iterdir()):
        if match := _LAYER_FILE.fullmatch(path.name):
            layers.setdefault(int(match[1]), {})[int(match[2])] = path
    for layer, ranks in sorted(layers.items()):
        prefix = f"{_TIED}.embed" if tied and layer == 0 else str(layer)
        yield {
            rank: {f"{prefix}.{name}": value for name, value in _load(path).items()}
            for rank, path in ranks.items()
        }
    if not layers:
        found = {
            int(match[1]): path
            for path in source.iterdir()
            if (match := _RANK_FILE.fullmatch(path.name))
        }
        if found:  # ZeRO 3 has no such files, and nothing frozen
            yield {rank: dict(_load(path)["module"]) for rank, path in found.items()}


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content


def _join(
    name: str, parts: Sequence[torch.Tensor], info: Mapping[str, Any], source: Path
) -> torch.Tensor:
    def listed(key: str) -> bool:
        return any(re.match(pattern, name) for pattern in info.get(key, ()))

    if listed("tp_replicated_parameter_patterns"):
        return parts[0]
    dim = 1 if listed("parameter_with_row_parallelism_patterns") else 0
    blocks: tuple[int, ...] | None = None
    for one in info.get("parameter_with_sub_params", ()):
        if any(re.match(pattern, name) for pattern in one["patterns"]):
            dim = one["partition_dim"]
            blocks = tuple(one["shape"][dim])
    try:
        if blocks is not None:
            return Partition(dim=dim, blocks=blocks).join(parts)
        whole = torch.cat(list(parts), dim=dim)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: the parts of parameter {name} do not make it up ({error})"
        ) from error
    if listed("vocabulary_parameter_patterns"):
        return whole.narrow(0, 0, int(info["original_vocab_size"]))
    return whole
