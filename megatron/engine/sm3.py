"""SM3: sums of squares by rows and columns instead of by numbers (Anil et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from megatron.engine.elementwise import with_gradients
from megatron.engine.fragments import FlatPart

Groups = tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]
_OWN, _SHARED = "sums_own", "sums_shared"


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Where the sums of one dimension of a parameter lie.

    Attributes:
        shared: whether other tensor ranks hold parts of the same rows (or columns).
        offset: where they begin among their like.
        size: how many there are.
    """

    shared: bool
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class _Rectangle:
    """Rows and columns of a parameter that lie together in the flat part.

    Attributes:
        name: of the parameter.
        offset: where the rectangle begins in the flat part.
        row: its first row.
        rows: how many.
        column: its first column.
        columns: how many.
    """

    name: str
    offset: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Cover:
    """What lies in one flat part, by rows and columns, and who holds the rest of them.

    Attributes:
        rectangles: the whole flat part but its padding.
        sums: of every parameter of the group, for rows and columns (rows alone of a vector).
        data_group: ranks that hold other pieces of the same parameters; None = nobody.
        tensor_group: ranks that hold other parts of them; None = nobody.
    """

    rectangles: Sequence[_Rectangle]
    sums: Mapping[str, tuple[_Sums, ...]]
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None

    def sizes(self) -> dict[str, int]:
        """Return how many sums there are, by name of the state tensor."""
        total = {_OWN: 0, _SHARED: 0}
        for one in (one for sums in self.sums.values() for one in sums):
            total[_SHARED if one.shared else _OWN] += one.size
        return total


def cover_of(
    part: FlatPart, cuts: Mapping[str, int | None], groups: Groups = (None, None)
) -> Cover:
    """Describe a flat part.

    Args:
        part: this rank's flat part of a group.
        cuts: the dimension along which tensor ranks divide a parameter; None = they do not.
        groups: of data ranks and of tensor ranks.
    """
    ends = {False: 0, True: 0}
    sums: dict[str, tuple[_Sums, ...]] = {}
    for name, shape in part.whole:
        found = []
        for dim, size in enumerate(_matrix(shape)[: max(1, min(2, len(shape)))]):
            shared = cuts.get(name) is not None and cuts[name] != dim
            found.append(_Sums(shared=shared, offset=ends[shared], size=size))
            ends[shared] += size
        sums[name] = tuple(found)
    rectangles = [
        rectangle
        for one in part.fragments
        for rectangle in _rectangles(
            one.name, one.offset, one.start, one.size, _matrix(one.shape)[1]
        )
    ]
    return Cover(rectangles=rectangles, sums=sums, data_group=groups[0], tensor_group=groups[1])


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return a shape as rows and columns; a vector has one column."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return shape[0], int(torch.Size(shape[1:]).numel())


def _rectangles(
    name: str, offset: int, start: int, size: int, columns: int
) -> Iterator[_Rectangle]:
    """Divide a range of a matrix, row after row, into a piece of a row, whole rows and a piece."""
    done = 0
    while done < size:
        row, column = divmod(start + done, columns)
        left = size - done
        whole = column == 0 and left >= columns
        rows = left // columns if whole else 1
        width = columns if whole else min(columns - column, left)
        yield _Rectangle(
            name=name, offset=offset + done, row=row, rows=rows, column=column, columns=width
        )
        done += rows * width


class SM3(Optimizer):
    """SM3-II (Anil et al. 2019, section 3), with GPT-NeoX's momentum and decay of the sums.

    A number's sum of squares is bounded by the least of its row's and its column's.  Under ZeRO
    the optimizer is told by :meth:`describe` what its flat parameters are made of; greatest
    values over rows and columns are then taken over all ranks, which is exact, so that every
    layout takes the same steps.  Vectors have a sum for each number.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        beta: float = 0.0,
        eps: float = 1e-30,
    ) -> None:
        """Take parameter groups.

        Args:
            groups: of parameters; weight decay in them has no effect.
            lr: learning rate.
            momentum: share of the update before in the next.
            beta: decay rate of the sums; 0 = they only grow.
            eps: added to a sum before its root.
        """
        super().__init__(
            [dict(group) for group in groups],
            {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps},
        )
        self._covers: dict[torch.Tensor, Cover] = {}

    def describe(self, flat: torch.Tensor, cover: Cover) -> None:
        """Say what a flat parameter is made of."""
        self._covers[flat] = cover

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; collective under ZeRO."""
        for group, parameter, gradient in with_gradients(self, closure):
            cover = self._covers.get(parameter) or _whole(parameter)
            state, momentum = self.state[parameter], group["momentum"]
            if not state:
                for name, size in cover.sizes().items():
                    state[name] = parameter.new_zeros(size, dtype=torch.float32)
                if momentum > 0:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
            update = _update(cover, state, gradient.reshape(-1), group).view_as(parameter)
            if momentum > 0:
                update = state["momentum_buffer"].mul_(momentum).add_(update, alpha=1.0 - momentum)
            parameter.sub_(update, alpha=group["lr"])
        return None


def _whole(parameter: torch.Tensor) -> Cover:
    """Describe a parameter that is what it looks like."""
    shape = tuple(parameter.shape)
    rectangles = list(_rectangles("", 0, 0, parameter.numel(), _matrix(shape)[1]))
    rows, columns = _matrix(shape)
    sums = [_Sums(shared=False, offset=0, size=rows)]
    if len(shape) > 1:
        sums.append(_Sums(shared=False, offset=rows, size=columns))
    return Cover(rectangles=rectangles, sums={"": tuple(sums)})


def _update(
    cover: Cover, state: dict[str, torch.Tensor], gradient: torch.Tensor, group: Mapping[str, Any]
) -> torch.Tensor:
    """Advance the sums; return the gradient over their roots."""
    beta = group["beta"]
    update = torch.zeros_like(gradient)
    largest = {name: torch.zeros_like(state[name]) for name in (_OWN, _SHARED)}
    for one in cover.rectangles:
        span = slice(one.offset, one.offset + one.rows * one.columns)
        part = gradient[span].view(one.rows, one.columns)
        places = _places(cover.sums[one.name], one)
        bound = state[places[0][0]][places[0][1]].unsqueeze(1).expand_as(part).clone()
        for name, place in places[1:]:
            bound = torch.minimum(bound, state[name][place])
        if beta > 0:
            bound.mul_(beta)
        bound.addcmul_(part, part, value=1.0 - beta)
        for dim, (name, place) in enumerate(places):
            reach = largest[name][place]
            torch.maximum(reach, bound.amax(dim=1 - dim), out=reach)
        update[span] = bound.add_(group["eps"]).rsqrt_().mul_(part).view(-1)
    _share(cover, largest)
    for name, reached in largest.items():
        # With decay a sum may shrink, and GPT-NeoX does not let it.
        state[name].copy_(torch.maximum(state[name], reached) if beta > 0 else reached)
    return update


def _places(sums: tuple[_Sums, ...], one: _Rectangle) -> list[tuple[str, slice]]:
    """Return the state tensor and the range in it of a rectangle's rows, and its columns."""
    starts = ((one.row, one.rows), (one.column, one.columns))
    return [
        (
            _SHARED if own.shared else _OWN,
            slice(own.offset + start, own.offset + start + size),
        )
        for own, (start, size) in zip(sums, starts, strict=False)
    ]


def _share(cover: Cover, largest: Mapping[str, torch.Tensor]) -> None:
    """Take the greatest over all ranks that hold numbers of the same rows and columns."""
    for name, group in (
        (_OWN, cover.data_group),
        (_SHARED, cover.data_group),
        (_SHARED, cover.tensor_group),
    ):
        if group is not None and largest[name].numel():
            dist.all_reduce(largest[name], op=dist.ReduceOp.MAX, group=group)
