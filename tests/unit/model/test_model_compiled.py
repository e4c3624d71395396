"""Compiled blocks: the same numbers, whole graphs, and no more of them than kinds of passes.

What is compiled to machine code in seconds is compiled by tests marked slow; here dynamo and
autograd's tracing do their work, and their graphs run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.model_spec import TestSpec
from torch._dynamo.utils import counters

from megatron.model import GPT, DomainLoss
from megatron.model.compiled import compile_blocks
from megatron.model.dropout import hashed_dropout
from megatron.model.kv_cache import KVCache

ROWS, LENGTH, VOCABULARY = 2, 16, 97


@pytest.fixture(autouse=True)
def fresh(monkeypatch: Any) -> Iterator[None]:
    """Count from nothing, and leave nothing compiled behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: Any) -> None:
    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda body, options, **named: plain(body, backend="aot_eager", **named)
    )


def batch(step: int, rows: int = ROWS, weight: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=generator)
    labels = (
        tokens[:, 1:].contiguous(),
        torch.ones(rows, LENGTH),
        torch.arange(rows) % 2 + step % 2,
        torch.full((rows,), weight / (rows * LENGTH)),
    )
    return tokens[:, :-1].contiguous(), labels


def built(spec: TestSpec, *, compiled: bool) -> GPT:
    model = GPT(spec, seed=1, loss_fn=DomainLoss(vocab_size=VOCABULARY))
    if compiled:
        assert compile_blocks(model, rows=ROWS, length=LENGTH) == spec.num_layers
    return model


def trained(spec: TestSpec, *, compiled: bool, steps: int = 3) -> tuple[list[float], GPT]:
    """Train and evaluate in turns, with another rate, other weights and domains at every step."""
    model = built(spec, compiled=compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        model.dropout.begin(step=step, micro_batch=0)
        loss: Any = model(*batch(step, weight=1.0 + step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            evaluated: Any = model(*batch(step + 100))
        model.train()
        losses += [loss.item(), evaluated.item()]
    return losses, model


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


PLAIN = {"gpt_j_residual": True, "rotary_pct": 0.25}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "many layers": ({**PLAIN, "num_layers": 24}, 1),
    "llama": (
        {
            "norm": "rmsnorm",
            "activation": "swiglu",
            "num_kv_heads": 2,
            "use_qk_layernorm": True,
            "no_weight_tying": True,
        },
        1,
    ),
    "documents": (
        {"reset_attention_mask": True, "reset_position_ids": True, "eod_token_id": 3},
        1,
    ),
    "bias by distance": ({"pos_emb": "rpe"}, 1),
    "kinds of attention": (
        {
            "num_layers": 6,
            "attention_config": ("global", "sparse_fixed", "gmlp") * 2,
            "max_position_embeddings": LENGTH,
        },
        3,
    ),
    "recomputed": (
        {"num_layers": 4, "checkpoint_activations": True, "checkpoint_num_layers": 2},
        1,
    ),
}
SLOW = {"llama", "bias by distance", "kinds of attention"}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_layers_of_a_kind_share_two_graphs_and_equal_the_model_as_it_is(kind: str) -> None:
    """One to train and one to evaluate, whatever changes from step to step."""
    changes, kinds = KINDS[kind]
    spec = TestSpec(**changes)
    plain, model = trained(spec, compiled=False)
    losses, same = trained(spec, compiled=True)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert graphs() == 2 * kinds
    own = dict(same.named_parameters())
    assert list(own) == [name for name, _ in model.named_parameters()]
    assert list(same.state_dict()) == list(model.state_dict())
    for name, value in model.named_parameters():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("traced")
def test_dropout_is_drawn_anew_and_the_same_again() -> None:
    spec = TestSpec(**PLAIN, hidden_dropout=0.2, attention_dropout=0.2)
    first, model = trained(spec, compiled=True)
    assert trained(spec, compiled=True)[0] == first
    dropped = []
    for step, micro in ((5, 0), (5, 1), (6, 0), (5, 0)):
        model.dropout.begin(step=step, micro_batch=micro)
        dropped.append(model(*batch(0)).item())
    assert dropped[0] == dropped[3]
    assert len(set(dropped)) == 3
    assert graphs() == 2
    kept = trained(TestSpec(**PLAIN, hidden_dropout=0.2, attention_dropout=0.2), compiled=False)
    assert first != kept[0]  # other masks of the same rates
    recomputed = TestSpec(
        **PLAIN, hidden_dropout=0.2, attention_dropout=0.2, checkpoint_activations=True
    )
    assert trained(recomputed, compiled=True)[0] == first


@pytest.mark.usefixtures("traced")
def test_other_shapes_and_cached_passes_are_not_compiled() -> None:
    spec = TestSpec(**PLAIN)
    _, model = trained(spec, compiled=True, steps=1)
    plain = built(spec, compiled=False)
    plain.load_state_dict(model.state_dict())
    before = graphs()
    cached = []
    for one in (model, plain):
        one.eval()
        with torch.no_grad():
            torch.testing.assert_close(one(*batch(7, rows=1)), plain(*batch(7, rows=1)))
            cache = KVCache(rows=ROWS, capacity=LENGTH)
            with cache.attached(one):
                cache.advance(torch.arange(LENGTH).expand(ROWS, -1))
                cached.append(one(batch(8)[0])[0])
    torch.testing.assert_close(cached[0], cached[1])
    assert graphs() == before


def test_hashed_dropout_keeps_the_share_and_the_mean() -> None:
    x = torch.ones(200_000)
    seeds = [torch.tensor(seed) for seed in (0, 1, 2**62 + 12345)]
    masks = [hashed_dropout(x, 0.3, seed) for seed in seeds]
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=5e-3)
        # Neighbours, and whole rows, are independent.
        for shift in (1, 64, 1000):
            both = ((mask == 0) & (mask.roll(shift) == 0)).double().mean().item()
            assert both == pytest.approx(0.09, abs=4e-3)
    for other in masks[1:]:
        both = ((masks[0] == 0) & (other == 0)).double().mean().item()
        assert both == pytest.approx(0.09, abs=4e-3)
    assert torch.equal(hashed_dropout(x, 0.3, seeds[0]), masks[0])
    assert hashed_dropout(x, 1.0, seeds[0]).abs().sum() == 0
    leaf = torch.ones(1000, requires_grad=True)
    out = hashed_dropout(leaf, 0.5, seeds[2])
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(leaf.grad, out.detach())


def test_hashed_dropout_draws_splitmix64() -> None:
    """Against the published recurrence in Python's own integers."""
    full, seed, rate = (1 << 64) - 1, 123456789, 0.4
    kept = []
    for place in range(64):
        z = (seed + place) * 0x9E3779B97F4A7C15 & full
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & full
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & full
        z ^= z >> 31
        signed = z - (1 << 64) if z >> 63 else z
        kept.append(signed >= int(rate * 2**64) - 2**63)
    drawn = hashed_dropout(torch.ones(64), rate, torch.tensor(seed))
    assert (drawn > 0).tolist() == kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [PLAIN, {}, {**PLAIN, "gpt_j_tied": True}])
def test_machine_code_accumulates_the_same_gradients(
    dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Of three micro-batches, added to one ``.grad``: none may share memory with another's."""
    found = []
    for compiled in (False, True, True):
        torch._dynamo.reset()
        model = built(TestSpec(**changes), compiled=compiled).to(dtype)
        losses = []
        for step in range(3):
            loss: Any = model(*batch(step))
            loss.backward()
            losses.append(loss.item())
        gradients = {name: own.grad for name, own in model.named_parameters()}
        found.append((losses, gradients))
        assert graphs() <= 1 + compiled
    (plain, expected), (ours, got), (again, same) = found
    assert ours == pytest.approx(plain, rel=1e-5 if dtype == torch.float32 else 5e-3)
    assert again == ours
    places = {gradient.untyped_storage().data_ptr() for gradient in got.values()}
    assert len(places) == len(got)
    for name, gradient in got.items():
        assert torch.equal(gradient, same[name])
        scale = expected[name].abs().max().item()
        bound = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(gradient, expected[name], rtol=0.0, atol=bound * scale + 1e-9)


@pytest.mark.slow
def test_machine_code_draws_the_same_dropout_again() -> None:
    spec = TestSpec(**PLAIN, hidden_dropout=0.2, attention_dropout=0.2)
    first, _ = trained(spec, compiled=True)
    assert trained(spec, compiled=True)[0] == first
    torch._dynamo.reset()
    recomputed = TestSpec(**{**vars(spec), "checkpoint_activations": True})
    assert trained(recomputed, compiled=True)[0] == first
