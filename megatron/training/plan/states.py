"""Weights, gradients and optimizer state on one rank, as DeepSpeed's ZeRO lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron.model.inventory import ParameterSize
from megatron.training.plan.zero import ZeroSettings

_MASTER, ADAM_MOMENTS = 4, 8
_ALIGNMENT = 2  # numbers; DeepSpeed starts every partition at a multiple of four bytes


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on the data rank that holds most.

    Attributes:
        weights: as the model computes with them (stage 3: this rank's part).
        gradients: as they are added up over micro-batches.
        master: float32 weights that the optimizer updates, apart from those above.
        moments: the optimizer's state beside them (of Adam two float32 numbers for each).
        bucket: buffers of gradients on their way to other ranks.
        gathered: parameters that stage 3 has gathered from other ranks, at most.
        arriving: a second copy of this rank's gradients while a micro-batch's are added
            (stage 2 with accumulation).
        reducing: what the reduction at the end of a step's backward passes adds (stages 0, 1).
        updating: what the update adds to weights and optimizer state, gradients included.
        host: bytes in host memory instead.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    bucket: int
    gathered: int
    arriving: int
    reducing: int
    updating: int
    host: int

    @property
    def optimizer(self) -> int:
        """Master weights and moments."""
        return self.master + self.moments


def states(
    parameters: Sequence[ParameterSize],
    zero: ZeroSettings,
    *,
    data_size: int,
    accumulation: int,
    expert_size: int = 1,
    state_bytes: int = ADAM_MOMENTS,
) -> States:
    """Work out the bytes for the parameters of one stage and tensor rank.

    Args:
        parameters: in the order of the modules.
        zero: DeepSpeed's settings.
        data_size: data-parallel ranks.
        accumulation: micro-batches per step.
        expert_size: data ranks that share experts out; an expert's state is divided among its
            copies alone.
        state_bytes: of the optimizer beside the master weights, for each number.
    """
    shared = (False, True) if expert_size > 1 else (None,)
    keys = [(decayed, expert) for expert in shared for decayed in (True, False)]
    counts = [
        [one.count for one in parameters if one.decayed == decayed and expert in (None, one.expert)]
        for decayed, expert in keys
    ]
    ranks = [data_size // (expert_size if expert else 1) for _, expert in keys]
    groups = [group for group in zip(counts, ranks, strict=True) if group[0]]
    if zero.stage == 3:
        return _whole_division([held for held, _ in groups], zero, data_size, state_bytes)
    return _flat_division(groups, zero, accumulation, state_bytes)


def _flat_division(
    counted: list[tuple[list[int], int]],
    zero: ZeroSettings,
    accumulation: int,
    state_bytes: int,
) -> States:
    """Stages 0 to 2: weights are whole, in one flat buffer a group, cut into equal parts.

    Each group comes with the number of ranks that divide it.
    """
    groups = [group for group, _ in counted]
    ranks = [number if zero.stage else 1 for _, number in counted]
    padded = [
        -(-sum(group) // (_ALIGNMENT * own)) * _ALIGNMENT * own if zero.stage else sum(group)
        for group, own in zip(groups, ranks, strict=True)
    ]
    part = [size // own for size, own in zip(padded, ranks, strict=True)]
    total, own, largest = sum(map(sum, groups)), sum(part), max(part)
    width, added = zero.width, zero.accumulated_width
    compact = zero.stage > 0 and added > width
    # Whole gradients of every parameter that lies in the rank's part, be it with one number.
    owned = own * added if compact else _most_touched(groups, part, ranks) * width
    host = 0
    gradients = {0: total * added, 1: total * added, 2: owned}[zero.stage]
    # On one data rank the model computes with the optimizer's weights (megatron.engine.lone_rank).
    shared = width == _MASTER and max(ranks) == 1
    master = 0 if shared else own * _MASTER
    moments = own * state_bytes
    updating = owned + (0 if compact else largest * added) + (largest * 4 if added < 4 else 0)
    if zero.stage == 0:
        updating = gradients + (total * 4 if added < 4 else 0)
    arriving = owned if zero.stage == 2 and accumulation > 1 and not compact else 0
    bucket_width = added if zero.stage == 1 else width
    bucket = zero.bucket * zero.buckets * bucket_width if zero.contiguous and zero.stage else 0
    reducing = owned if zero.stage == 1 else min(total, zero.bucket) * width
    if zero.kept_float32:
        gradients = updating = sum(padded) * added
        bucket, reducing = 0, min(total, zero.bucket) * added
    if zero.optimizer_on_host and zero.stage:
        # Master weights, their gradients, moments, a copy in the model's format; and the sums.
        host = own * (_MASTER + 4 + state_bytes + width) + (own * width if accumulation > 1 else 0)
        largest_parameter = max(map(max, groups))
        bucket += largest_parameter * width
        master = moments = updating = arriving = reducing = 0
        gradients = gradients if zero.stage == 1 else 0
    return States(
        weights=sum(padded) * width,
        gradients=gradients,
        master=master,
        moments=moments,
        bucket=bucket,
        gathered=0,
        arriving=arriving,
        reducing=reducing if zero.stage < 2 else 0,
        updating=updating,
        host=host,
    )


def _whole_division(
    groups: list[list[int]], zero: ZeroSettings, data_size: int, state_bytes: int
) -> States:
    """Stage 3: every parameter is cut by itself; small ones are kept whole beside."""
    counts = [count for group in groups for count in group]
    own = sum(-(-count // data_size) for count in counts)
    width, added = zero.width, zero.accumulated_width
    persistent = 0
    for count in counts:
        if count <= zero.persistent and persistent + count <= zero.persistent_total:
            persistent += count
    working = min(sum(counts), max(zero.live, max(counts)) + persistent)
    weights, gradients = own * width, own * added
    # Weights that are float32 already are meant not to be copied, and are: DeepSpeed compares
    # a tensor's device with a device's name.
    master, moments = own * _MASTER, own * state_bytes
    updating = min(own, zero.sub_group) * 4
    host = 0
    if zero.optimizer_on_host:
        host, master, moments = master + moments + own * 4 + gradients, 0, 0
        gradients = updating = 0
    if zero.weights_on_host:
        host, weights = host + weights, 0
    return States(
        weights=weights,
        gradients=gradients,
        master=master,
        moments=moments,
        bucket=zero.bucket * zero.communicated_width if zero.contiguous else 0,
        gathered=working * width,
        arriving=0,
        reducing=0,
        updating=updating + gradients,
        host=host,
    )


def _most_touched(groups: list[list[int]], part: list[int], ranks: list[int]) -> int:
    """Return the numbers of all parameters that the part of one rank overlaps, at most."""
    touched = [0] * max(ranks)
    for counts, size, own in zip(groups, part, ranks, strict=True):
        change, start = [0] * (own + 1), 0
        for count in counts:
            change[start // size] += count
            change[(start + count - 1) // size + 1] -= count
            start += count
        sums = [*accumulate(change[:-1])]
        # Data rank r has the part r // e of a group that every e-th rank divides.
        each = len(touched) // own
        touched = [before + sums[rank // each] for rank, before in enumerate(touched)]
    return max(touched)
