"""Copies of state in host memory: true copies, of the same bytes as the original's file."""

from __future__ import annotations

import errno
import io
import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.engine import host_copy
from megatron.engine.host_copy import HostCopies, compact
from megatron.errors import RunError

BIG = (1 << 20) // 4  # numbers of 4 bytes, whose buffer has pages of its own


class Scale:
    """Like DeepSpeed's loss scaler: an object that changes in place."""

    def __init__(self) -> None:
        self.value = 4.0


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(64, generator=generator)
    shared = torch.randn(BIG, generator=generator)
    weight = nn.Parameter(flat[:40].view(5, 8).detach(), requires_grad=False)
    weight.ds_id = 3  # type: ignore[attr-defined]
    return {
        "module": {"weight": weight, "bias": flat[40:60], "tied": flat[:40].view(5, 8)},
        "groups": [shared, shared[: BIG // 2].view(2, -1).t(), torch.tensor(7)],
        "part": torch.randn(10_000, generator=generator, dtype=torch.float64)[5:10],
        "master": torch.randn(30, generator=generator, requires_grad=True),
        "half": torch.randn(BIG, generator=generator).bfloat16(),
        "shapes": (torch.Size([3, 4]), torch.empty(0)),
        "scale": {"value": Scale().value},
        "numbers": [1, 2.5, None, True],
    }


def file_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(compact(value), buffer)
    return buffer.getvalue()


def test_the_file_of_a_copy_is_that_of_the_original() -> None:
    copies = HostCopies(pinned=False)
    original = state()
    expected = file_of(original)
    copies.begin()
    taken = copies.take(original)
    assert file_of(taken) == expected
    assert taken["module"]["weight"].ds_id == 3
    assert taken["master"].requires_grad
    for values in (original["module"], original):
        for tensor in values.values():
            if torch.is_tensor(tensor):
                with torch.no_grad():
                    tensor.zero_()
    original["groups"][0].zero_()
    original["numbers"].append(3)
    original["scale"]["value"] = 8.0
    assert file_of(taken) == expected  # nothing of it is the original's


def test_an_object_that_changes_is_copied_too() -> None:
    scale, copies = Scale(), HostCopies(pinned=False)
    copies.begin()
    taken = copies.take({"scaler": scale, "x": torch.ones(3)})
    scale.value = 1.0
    assert taken["scaler"].value == 4.0


def test_buffers_are_used_again_and_grow_with_the_state() -> None:
    copies = HostCopies(pinned=False)

    def places(value: Any) -> list[int]:
        copies.begin()
        taken = copies.take(value)
        return [taken["a"].data_ptr(), taken["b"].data_ptr()]

    first = places({"a": torch.ones(BIG), "b": torch.ones(10)})
    assert places({"a": torch.zeros(BIG), "b": torch.zeros(10)}) == first
    assert copies.bytes == 4 * BIG + 40
    places({"a": torch.zeros(2 * BIG), "b": torch.zeros(10)})
    assert copies.bytes == 8 * BIG + 40


def test_a_small_part_of_a_large_buffer_is_written_alone() -> None:
    flat = torch.arange(100_000.0)
    layer = {"a": flat[:100], "again": flat[:100], "b": flat[500:600]}
    small = compact(layer)
    assert small["a"].untyped_storage().nbytes() == 400
    assert small["a"].data_ptr() == small["again"].data_ptr()
    assert torch.equal(small["b"], layer["b"])
    assert len(file_of(layer)) < 5_000
    whole = {"a": flat[:50_000], "b": flat[50_000:]}
    assert compact(whole) is whole  # nothing is copied that need not be


def test_pages_are_locked_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def register(pointer: int, size: int, flags: int) -> int:
        asked.append((pointer, size, flags))
        return 0

    released: list[int] = []
    calls = {"cudaHostRegister": register, "cudaHostUnregister": released.append}
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(**calls))
    copies = HostCopies(pinned=True)
    copies.begin()
    taken = copies.take({"large": torch.ones(BIG), "small": torch.ones(3)})
    assert asked == [(taken["large"].data_ptr(), 4 * BIG, 1)]
    assert asked[0][0] % mmap.PAGESIZE == 0
    copies.wait()
    copies.begin()
    copies.take({"large": torch.ones(2 * BIG), "small": torch.ones(4)})
    assert released == [asked[0][0]]
    assert [size for _, size, _ in asked] == [4 * BIG, 8 * BIG]


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(host_copy.mmap, "mmap", refuse)
    copies = HostCopies(pinned=False)
    copies.begin()
    with pytest.raises(RunError, match=r"async_save .*1,048,576 bytes.*async_save: false"):
        copies.take({"x": torch.ones(BIG)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_gpu_does_next_is_not_in_the_copy() -> None:
    weights = torch.arange(float(BIG * 16), device="cuda")
    expected = weights.cpu()
    copies = HostCopies(pinned=True)
    for _ in range(2):
        copies.begin()
        taken = copies.take({"w": weights})
        weights.add_(1)  # queued behind the copy
        copies.wait()
        assert taken["w"].device.type == "cpu"
        assert torch.equal(taken["w"], expected)
        expected = expected + 1
