"""Which pieces of which parameters lie in a flat part of the optimizer's state.

DeepSpeed's ZeRO joins the parameters of a group into one long tensor and gives every data rank
a part of it; what lies where is read off its own tables here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A piece of one parameter in a flat part of the optimizer's state.

    Attributes:
        name: the parameter's name.
        shape: this tensor rank's shape of it.
        start: where the piece begins in the parameter, flattened.
        size: numbers in it.
        offset: where it begins in the flat part.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class FlatPart:
    """This rank's flat part of one group of parameters.

    Attributes:
        flat: the fp32 weights, which the optimizer updates.
        fragments: what lies in it.
        whole: (name, this tensor rank's shape) of every parameter of the group, in order, also
            of those that lie on other data ranks.
    """

    flat: torch.Tensor
    fragments: Sequence[Fragment]
    whole: Sequence[tuple[str, tuple[int, ...]]]


def is_stage_3(optimizer: Any) -> bool:
    """Tell whether DeepSpeed's optimizer is that of ZeRO 3."""
    return hasattr(optimizer, "fp16_partitioned_groups_flat")


def is_flat(optimizer: Any) -> bool:
    """Tell whether DeepSpeed's optimizer keeps flat parts (ZeRO 1 to 3)."""
    return is_stage_3(optimizer) or hasattr(optimizer, "param_names")


def is_resident(optimizer: Any) -> bool:
    """Tell whether it is DeepSpeed's own of ZeRO 1 or 2, with its state where the weights are."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload


def is_resident_stage_3(optimizer: Any) -> bool:
    """Tell whether it is DeepSpeed's own of ZeRO 3, with its state where the weights are."""
    return (
        is_stage_3(optimizer)
        and type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
        and not optimizer.offload_optimizer
        and not optimizer.swap_optimizer
    )


def flat_parts(optimizer: Any) -> Iterator[FlatPart]:
    """Yield this rank's flat parts.

    Args:
        optimizer: DeepSpeed's, of ZeRO 1 to 3.
    """
    yield from (_stage_3 if is_stage_3(optimizer) else _stage_1_and_2)(optimizer)


def _stage_1_and_2(optimizer: Any) -> Iterator[FlatPart]:
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    for group, parameters in zip(optimizer.optimizer.param_groups, groups, strict=True):
        found = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            own, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            found.append(
                Fragment(
                    name=optimizer.param_names[parameter],
                    shape=tuple(parameter.shape),
                    start=own.start,
                    size=own.numel,
                    offset=flat.start,
                )
            )
        whole = [(optimizer.param_names[one], tuple(one.shape)) for one in parameters]
        yield FlatPart(flat=group["params"][0], fragments=found, whole=whole)


def _stage_3(optimizer: Any) -> Iterator[FlatPart]:
    parts = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for parameters, flat in parts:
        whole = [(optimizer.param_names[one], tuple(one.ds_shape)) for one in parameters]
        yield FlatPart(flat=flat, fragments=list(_of_stage_3(optimizer, parameters)), whole=whole)


def _of_stage_3(optimizer: Any, parameters: Sequence[Any]) -> Iterator[Fragment]:
    """Yield what lies in a flat part: of every parameter an equal share, the last one padded."""
    offset = 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = share * torch.distributed.get_rank(
            group=optimizer._get_param_partition_group(parameter)
        )
        size = max(0, min(share, parameter.ds_numel - start))
        if size:
            yield Fragment(
                name=optimizer.param_names[parameter],
                shape=tuple(parameter.ds_shape),
                start=start,
                size=size,
                offset=offset,
            )
        offset += share
