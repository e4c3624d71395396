"""Counting without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.model import flops_per_token, parameter_count
from tests.support.model_spec import TestSpec

ROOT = Path(__file__).parents[3]


def test_gpt2_small() -> None:
    spec = TestSpec(
        vocab_size=50257,
        make_vocab_size_divisible_by=128,
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        seq_length=1024,
    )
    # 124M without learned positions; 0.80 GFLOP per token.
    assert parameter_count(spec) == 50304 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert flops_per_token(spec) == pytest.approx(0.80e9, rel=0.01)
    attention = 6 * 12 * 768 * 1024
    assert flops_per_token(spec, causal=False) - flops_per_token(spec) == attention


def test_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron.model import parameter_count\n"
        "from tests.support.model_spec import TestSpec\n"
        "print(parameter_count(TestSpec()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(parameter_count(TestSpec()))
