"""One rank's view of the layout: its coordinates and the process groups it talks in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.parallel.layout import Coordinates, Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A layout seen from one rank, handed to whatever is parallel; never global.

    Attributes:
        layout: how all ranks are arranged.
        rank: this rank.
        sequence_parallel: whether tensor ranks divide the sequence between the layers they
            share; ignored where there is one such rank.
        tensor_group: ranks that share this rank's layers; None where there is only one, or
            in a topology made for arithmetic alone.
        data_group: ranks that hold the same parameters; None likewise.
        pipe_group: the ranks of this rank's pipeline; None likewise.
        expert_group: ranks that share experts out; None likewise.
        host_data_group: the ranks of ``data_group`` in a group for numbers on the host.
        tensor_group_name: of ``tensor_group``, as torch knows it in compiled code.
    """

    layout: Layout
    rank: int
    sequence_parallel: bool = False
    tensor_group: ProcessGroup | None = field(default=None, compare=False)
    data_group: ProcessGroup | None = field(default=None, compare=False)
    pipe_group: ProcessGroup | None = field(default=None, compare=False)
    expert_group: ProcessGroup | None = field(default=None, compare=False)
    host_data_group: ProcessGroup | None = field(default=None, compare=False)
    tensor_group_name: str | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        """Look the group's name up, which compiled code cannot."""
        name = getattr(self.tensor_group, "group_name", None)
        object.__setattr__(self, "tensor_group_name", name)

    @classmethod
    def single(cls) -> Topology:
        """Return the topology of one process by itself."""
        return cls(layout=Layout(world_size=1), rank=0)

    @classmethod
    def create(cls, layout: Layout, rank: int, *, sequence_parallel: bool = False) -> Topology:
        """Create the process groups of ``layout``; collective, every rank calls it once.

        Args:
            layout: arrangement of the ranks of the initialised default process group.
            rank: this rank.
            sequence_parallel: see :class:`Topology`.

        Raises:
            RuntimeError: torch.distributed is not initialised while there are several ranks.
        """
        data_group = _own_group(layout.data_groups(), rank)
        return cls(
            layout=layout,
            rank=rank,
            sequence_parallel=sequence_parallel,
            tensor_group=_own_group(layout.tensor_groups(), rank),
            data_group=data_group,
            host_data_group=_host_group(data_group, layout.data_groups(), rank),
            pipe_group=_own_group(layout.pipe_groups(), rank),
            expert_group=_own_group(layout.expert_groups(), rank),
        )

    def with_all_experts(self) -> Topology:
        """Return the same place in a layout whose every data rank holds all experts."""
        layout = dataclasses.replace(self.layout, expert_size=1)
        return dataclasses.replace(self, layout=layout, expert_group=None)

    @property
    def coordinates(self) -> Coordinates:
        """Where this rank stands."""
        return self.layout.coordinates(self.rank)

    @property
    def tensor_size(self) -> int:
        """Number of ranks that share each layer."""
        return self.layout.tensor_size

    @property
    def tensor_rank(self) -> int:
        """This rank's place among the ranks that share its layers."""
        return self.coordinates.tensor

    @property
    def splits_sequence(self) -> bool:
        """Whether this rank holds only its part of the sequence between shared layers."""
        return self.sequence_parallel and self.tensor_size > 1

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.layout.data_size

    @property
    def data_rank(self) -> int:
        """This rank's place among the data-parallel ranks."""
        return self.coordinates.data

    @property
    def expert_size(self) -> int:
        """Number of data ranks that share experts out among themselves."""
        return self.layout.expert_size

    @property
    def expert_rank(self) -> int:
        """This rank's place among them."""
        return self.data_rank % self.expert_size

    @property
    def pipe_size(self) -> int:
        """Number of pipeline stages."""
        return self.layout.pipe_size

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return self.coordinates.pipe

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's stage takes the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage gives the loss."""
        return self.stage == self.pipe_size - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Topology:
        """Return itself: process groups cannot be copied and a topology never changes."""
        return self


def _host_group(
    group: ProcessGroup | None, groups: list[list[int]], rank: int
) -> ProcessGroup | None:
    """Return ``group`` if it speaks gloo, else a gloo group of the same ranks."""
    if group is None:
        return None
    import torch.distributed as dist

    return group if dist.get_backend(group) == "gloo" else _own_group(groups, rank, "gloo")


def _own_group(
    groups: list[list[int]], rank: int, backend: str | None = None
) -> ProcessGroup | None:
    """Create every group (all ranks must take part in each creation); return this rank's own."""
    if len(groups[0]) == 1:
        return None
    import torch.distributed as dist

    if not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialised before a topology is created")
    own: ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(ranks, backend=backend)
        if rank in ranks:
            own = group
    return own
