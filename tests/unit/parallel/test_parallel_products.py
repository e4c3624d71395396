"""Products with weights are torch's to the last few bits, whichever library does them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron.parallel import products

HAVE = torch._C._has_mkldnn
# More outputs than inputs, fewer, as many, and rows that are no multiple of anything.
SHAPES = ((256, 128, 384), (256, 384, 128), (256, 256, 256), (331, 200, 120))


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param and not HAVE:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_ONEDNN", request.param)
    yield request.param
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of what oneDNN was asked for."""
    asked: list[tuple[int, ...]] = []
    eager = products._eager

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append((*x.shape, weight.shape[0]))
        return eager(x, weight, bias)

    monkeypatch.setattr(products, "_eager", counted)
    return asked


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_values_and_gradients_are_those_of_float64(
    rows: int, inputs: int, outputs: int, biased: bool, compiled: bool, library: bool
) -> None:
    x = normal(2, rows, inputs, seed=1).requires_grad_()
    weight = normal(outputs, inputs, seed=2).requires_grad_()
    bias = normal(outputs, seed=3).requires_grad_() if biased else None
    function = products.linear
    if compiled:
        function = torch.compile(products.linear, fullgraph=True, backend="aot_eager")
    y = function(x, weight, bias)
    gradient = normal(2, rows, outputs, seed=4)
    own = [x, weight] if bias is None else [x, weight, bias]
    found = torch.autograd.grad(y, own, gradient)

    wide = [one.detach().double().requires_grad_() for one in own]
    exact = F.linear(wide[0], wide[1], wide[2] if biased else None)
    assert_close(y.detach(), exact.detach())
    for one, other in zip(found, torch.autograd.grad(exact, wide, gradient.double()), strict=True):
        assert_close(one, other)
        assert one.is_contiguous()


@pytest.mark.skipif(not HAVE, reason="this torch has no oneDNN")
def test_a_gradient_that_nobody_needs_costs_no_product(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", True)
    x, weight = normal(300, 200, seed=1), normal(120, 200, seed=2)
    forward, by_x, by_weight = (300, 200, 120), (300, 120, 200), (120, 300, 200)
    for needing, product in ((x, by_x), (weight, by_weight)):
        needing.requires_grad_()
        products.linear(x, weight).sum().backward()
        needing.requires_grad_(False)
        assert calls == [forward, product]
        calls.clear()


@pytest.mark.parametrize("rows", [100, 256, 700])
def test_a_product_is_written_where_it_is_asked_for(rows: int, library: bool) -> None:
    x, weight = normal(rows, 256, seed=1), normal(640, 256, seed=2)
    out = torch.full((rows, 640), torch.nan)
    assert products.linear_into(out, x, weight).data_ptr() == out.data_ptr()
    assert_close(out, x.double() @ weight.double().T)


def test_other_types_and_small_products_are_torchs(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_ONEDNN", True)
    weight = normal(512, 512, seed=2)
    cases = [(normal(8, 512, seed=1), weight), (normal(64, 32, seed=1), weight[:, :32])]
    for kind in (torch.bfloat16, torch.float64):
        cases.append((normal(64, 512, seed=1).to(kind), weight.to(kind)))
    cases += [(normal(0, 512, seed=1), weight), (normal(512, seed=1), weight)]
    for x, taken in cases:
        assert torch.equal(products.linear(x, taken), F.linear(x, taken))
        assert not calls
    if HAVE:
        products.linear(normal(64, 512, seed=1), weight)
        assert calls == [(64, 512, 512)]


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f\n\nvendor_id: x", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n\nflags: avx512f", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_the_processor_decides(described: str, expected: bool) -> None:
    assert products._is_amd_with_avx512(described) is expected
