"""The policy for steps that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.data.plan import Plan
from megatron.signals.ledger import StepTotals
from megatron.training.guard import NonFiniteError, NonFiniteGuard

PLAN = Plan(
    step=7,
    domain=np.array([0, 1, 1, 0], dtype=np.int32),
    epoch=np.array([0, 2, 2, 0]),
    sample=np.array([10, 11, 12, 13]),
    weights=np.array([0.5, 0.5]),
)


def totals(*loss: float, skipped: bool = False) -> StepTotals:
    return StepTotals(
        loss_sum=np.array(loss),
        token_count=np.array([8.0, 8.0]),
        square_sum=np.array(loss) ** 2 / 64,
        sample_count=np.ones(2),
        skipped=skipped,
        stop=False,
    )


def guard(limit: int, *, loss_scaling: bool = False) -> NonFiniteGuard:
    return NonFiniteGuard(limit=limit, loss_scaling=loss_scaling, domains=["prose", "code"])


def test_stop_names_step_domain_and_samples() -> None:
    with pytest.raises(NonFiniteError) as error:
        guard(0).check(PLAN, totals(1.0, float("nan"), skipped=True))
    text = str(error.value)
    assert "step 7" in text
    assert "'code'" in text
    assert "'prose'" not in text
    assert "epoch 2, sample 11" in text
    assert "sample 12" in text
    assert error.value.exit_code == 1


def test_a_gradient_alone_counts_unless_the_loss_is_scaled() -> None:
    with pytest.raises(NonFiniteError, match="gradient"):
        guard(0).check(PLAN, totals(1.0, 2.0, skipped=True))
    scaled = guard(0, loss_scaling=True)
    assert all(scaled.check(PLAN, totals(1.0, 2.0, skipped=True)) for _ in range(50))


def test_skip_allows_less_than_k_in_a_row_and_survives_a_resume() -> None:
    patient = guard(3)
    bad, good = totals(float("inf"), 1.0, skipped=True), totals(1.0, 1.0)
    assert patient.check(PLAN, bad)
    assert patient.check(PLAN, bad)
    assert not patient.check(PLAN, good)
    assert patient.check(PLAN, bad)
    resumed = guard(3)
    resumed.load_state_dict(patient.state_dict())
    assert resumed.check(PLAN, bad)
    with pytest.raises(NonFiniteError, match="3 in a row"):
        resumed.check(PLAN, bad)
