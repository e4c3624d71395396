"""Leaving out what DeepSpeed does for many data ranks where there is one.

It copies every gradient into a bucket, divides it by the number of ranks, copies the sum back,
and copies it out of the bucket again: at 27 million parameters and 1,024 tokens a step a twelfth
of the time.  With one rank the sum is the gradient.

It also keeps the weights that this rank updates apart from those that the model computes with,
and copies them over after each update.  With one rank, in float32, both are the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.engine.fragments import is_resident

_KEPT_BYTES = 256 << 20


def spare_reduction(optimizer: Any) -> bool:
    """Let DeepSpeed's optimizer take gradients as they are, where no other rank has any.

    Args:
        optimizer: DeepSpeed's; nothing is done unless it is that of ZeRO 1 or 2, not offloaded,
            with no experts, and one rank in every group that adds gradients up.

    Returns:
        Whether it was done.
    """
    if not is_resident(optimizer):
        return False
    groups = [optimizer.dp_process_group, *optimizer.real_dp_process_group]
    if optimizer.has_moe_layers or any(dist.get_world_size(group) > 1 for group in groups):
        return False
    # Other factors than the number of ranks would round.
    if not optimizer.postscale_gradients or optimizer.gradient_predivide_factor != 1.0:
        return False
    optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda parameter, group: None
    optimizer.reduce_ipg_grads = lambda comm_dtype=None: None
    optimizer.flatten_dense_tensors_aligned = _Flattened(optimizer)
    _share_weights(optimizer)
    return True


def _share_weights(optimizer: Any) -> None:
    """Let the model compute with the weights that are updated, where they have one type.

    DeepSpeed's copy after an update is then one of a tensor onto itself, which torch leaves out.
    """
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        held = optimizer.bit16_groups_flat[group]
        if held.dtype != master.dtype or held.shape != master.shape:
            continue
        optimizer.bit16_groups_flat[group] = flat = master.detach()
        optimizer.parallel_partitioned_bit16_groups[group] = optimizer.get_data_parallel_partitions(
            flat, group
        )
        optimizer._update_model_bit16_weights(group)
        for parameter in optimizer.bit16_groups[group]:
            mapping = parameter._hp_mapping
            place = mapping.lp_fragment_address
            mapping.lp_fragment = parameter.data.flatten().narrow(0, place.start, place.numel)


class _Flattened:
    """Puts a group's gradients together for the optimizer, in memory that is kept.

    New memory comes a page at a time and zeroed by the kernel, which on a CPU takes several times
    as long as the copy.  Like what :mod:`megatron.engine.lighten` keeps, it is bounded.  Half
    precision is widened on the way, which DeepSpeed would do in a copy of its own.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._theirs = optimizer.flatten_dense_tensors_aligned
        self._kept: torch.Tensor | None = None

    def __call__(
        self, tensors: Sequence[torch.Tensor], alignment: int, **named: Any
    ) -> torch.Tensor:
        """Return the tensors one after the other; gradients are good until the next call."""
        size, dtype = sum(tensor.numel() for tensor in tensors), self._master_dtype()
        gradients = any(tensors is one for one in self._optimizer.averaged_gradients.values())
        bounded = size * dtype.itemsize <= _KEPT_BYTES and size % alignment == 0
        if not gradients or not bounded or named or tensors[0].device.type != "cpu":
            flat: torch.Tensor = self._theirs(tensors, alignment, **named)
            return flat
        if self._kept is None or self._kept.numel() < size:
            self._kept = torch.empty(size, dtype=dtype)
        with torch.no_grad():
            return torch.cat([tensor.reshape(-1) for tensor in tensors], out=self._kept[:size])

    def _master_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._optimizer.single_partition_of_fp32_groups[0].dtype
        return dtype
