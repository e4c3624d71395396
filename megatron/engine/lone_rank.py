"""Leaving out what DeepSpeed does to add up the gradients of data ranks where there is one.

It copies every gradient into a bucket, divides it by the number of ranks, copies the sum back,
and copies it out of the bucket again: at 27 million parameters and 1,024 tokens a step a twelfth
of the time.  With one rank the sum is the gradient.
"""

from __future__ import annotations

from typing import Any


def spare_reduction(optimizer: Any) -> bool:
    """Let DeepSpeed's optimizer take gradients as they are, where no other rank has any.

    Args:
        optimizer: DeepSpeed's; nothing is done unless it is that of ZeRO 1 or 2, not offloaded,
            with no experts, and one rank in every group that adds gradients up.

    Returns:
        Whether it was done.
    """
    import torch.distributed as dist
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.cpu_offload:
        return False
    groups = [optimizer.dp_process_group, *optimizer.real_dp_process_group]
    if optimizer.has_moe_layers or any(dist.get_world_size(group) > 1 for group in groups):
        return False
    # Other factors than the number of ranks would round.
    if not optimizer.postscale_gradients or optimizer.gradient_predivide_factor != 1.0:
        return False
    optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda parameter, group: None
    optimizer.reduce_ipg_grads = lambda comm_dtype=None: None
    return True
