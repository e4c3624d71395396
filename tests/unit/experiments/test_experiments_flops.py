"""Costs by formula, against what torch counts, and what methods are charged."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.model_spec import TestSpec
from support.source import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.errors import ConfigError
from megatron.experiments.flops import (
    Spent,
    charge,
    spent_by_ledger,
    steps_within,
)
from megatron.model import GPT, DomainLoss
from megatron.model.accounting import forward_flops, training_flops

SHAPES = {
    "narrow": {},
    "as MixBench": {"hidden_size": 64, "seq_length": 64, "vocab_size": 256},
    "long": {"seq_length": 256},
    "untied": {"hidden_size": 64, "no_weight_tying": True, "num_layers": 3},
    "gated and grouped": {
        "hidden_size": 64,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "use_bias_in_mlp": False,
        "use_bias_in_attn_linear": False,
    },
    "parallel": {"gpt_j_residual": True, "intermediate_size": 48},
}
BATCH = 2


def counted(spec, *, backward):
    """Return what torch counts for one batch.

    The math backend, because nothing is counted of the CPU's own attention; it multiplies
    the whole matrix and then masks it, so that the full form is what it does.
    """
    model = GPT(spec, seed=1, loss_fn=DomainLoss(vocab_size=spec.vocab_size))
    tokens = torch.zeros(BATCH, spec.seq_length, dtype=torch.long)
    labels = (tokens, torch.ones(tokens.shape), torch.arange(BATCH), torch.ones(BATCH))
    # With gradients on, the loss takes those of its own product in the forward pass already.
    with (
        torch.set_grad_enabled(backward),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        loss = model(tokens, labels)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_counts_the_same(shape):
    spec = TestSpec(**shape)
    tokens = BATCH * spec.seq_length
    forward, both = counted(spec, backward=False), counted(spec, backward=True)
    assert forward_flops(spec, tokens, causal=False) == pytest.approx(forward, rel=0.02)
    assert training_flops(spec, tokens, causal=False) == pytest.approx(both, rel=0.02)


def test_causal_attention_is_half_of_it():
    spec = TestSpec(seq_length=256)
    full, causal = (training_flops(spec, 1, causal=form) for form in (False, True))
    attention = 12 * spec.num_layers * spec.hidden_size * spec.seq_length
    assert full - causal == pytest.approx(attention / 2)


def test_a_method_pays_for_all_it_needs_once():
    spec, small = TestSpec(), TestSpec(hidden_size=16)
    reference = charge(small, Spent(trained=1000))
    proxy = charge(
        small, Spent(trained=1000, reference=1000), references=(reference,), reference_spec=small
    )
    bill = charge(
        spec,
        Spent(trained=5000, validation=300, foresight=200, gradients=100, probes=400),
        proxies=(proxy,),
    )
    train, forward = training_flops(spec, 1), forward_flops(spec, 1)
    small_train, small_forward = training_flops(small, 1), forward_flops(small, 1)
    assert train == pytest.approx(3 * forward)
    assert proxy.total == pytest.approx(2000 * small_train + 1000 * small_forward)
    assert bill.beside == pytest.approx(500 * forward + 100 * train + proxy.total)
    assert bill.total == pytest.approx(5000 * train + bill.beside)  # probes are among the 5000
    assert bill.probes == pytest.approx(400 * train)


def test_extra_tokens_of_a_ledger_are_priced():
    kinds = {"validation": 10, "probes": 20, "reference": 30, "foresight": 40}
    losses = spent_by_ledger(100, kinds, foresight_trains=False)
    assert losses == Spent(trained=100, validation=10, probes=20, reference=30, foresight=40)
    gradients = spent_by_ledger(100, kinds, foresight_trains=True)
    assert gradients == Spent(trained=100, validation=10, probes=20, reference=30, gradients=40)
    assert spent_by_ledger(100, {}, foresight_trains=True) == Spent(trained=100)


def test_every_kind_of_cost_in_tokens_has_a_price():
    from megatron.monitor.overhead import KINDS

    tokens = set(KINDS) - {"collective", "update"}  # these take time and no tokens
    spent_by_ledger(100, dict.fromkeys(tokens, 1), foresight_trains=False)
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        spent_by_ledger(100, {"validatoin": 1}, foresight_trains=False)


def test_impossible_costs_are_refused():
    with pytest.raises(ConfigError, match="never below 0"):
        Spent(trained=10, validation=-1)
    with pytest.raises(ConfigError, match="never below 0"):
        Spent(trained=float("nan"))
    with pytest.raises(ConfigError, match="probing steps are training steps"):
        Spent(trained=10, probes=11)


def test_steps_of_an_equal_budget():
    step = training_flops(TestSpec(), 32 * 64)
    assert steps_within(400 * step, per_step=step) == 400
    assert steps_within(400 * step, per_step=step * 4 / 3, fixed=100 * step) == 225
    assert steps_within(400 * step - 1, per_step=step, fixed=0) in (399, 400)
    with pytest.raises(ConfigError, match="raise it"):
        steps_within(10 * step, per_step=step, fixed=10 * step)


def test_prices_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import megatron.experiments.flops\n"
        "from megatron.model.accounting import training_flops\n"
        "from tests.support.model_spec import TestSpec\n"
        "print(training_flops(TestSpec(), 1) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr
