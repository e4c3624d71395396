"""What counts as a spike of the loss, and what the guard remembers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron.config.policies import split_policy
from megatron.config.run import TrainingConfig
from megatron.data.plan import Plan
from megatron.signals.ledger import StepTotals
from megatron.training.guard import NonFiniteGuard, RunGuard
from megatron.training.spikes import Spike, SpikeError, SpikeGuard

NAMES = ["easy", "hard"]
LEVELS = np.array([2.0, 5.0])


def guard(policy: Any = "warn", **changes: Any) -> SpikeGuard:
    settings = {"limit": 2, "sigma": 6.0, "window": 10, "domains": NAMES, **changes}
    return SpikeGuard(policy=policy, **settings)


def step(watched: SpikeGuard, number: int, share: float = 0.5, rise: float = 0.0) -> Spike | None:
    """Tell of a step with this share of the easy domain, its losses raised by ``rise``."""
    noise = np.random.default_rng(number).normal(0, 0.02, 2)
    tokens = np.array([share, 1 - share]) * 1000
    return watched.after(number, (LEVELS + noise + rise) * tokens, tokens)


def watch(watched: SpikeGuard, steps: int = 30) -> SpikeGuard:
    for number in range(steps):
        assert step(watched, number) is None
    return watched


def test_a_rise_of_the_loss_is_a_spike_and_a_harder_mixture_is_not() -> None:
    watched = watch(guard())
    assert step(watched, 100, share=0.05) is None  # the mean loss has risen by more than 1
    spike = step(watched, 101, rise=0.5)
    assert spike is not None
    assert spike.loss == pytest.approx(4.0, abs=0.1)
    assert spike.expected == pytest.approx(3.5, abs=0.1)
    # It teaches nothing: the same again is a spike again, and the level is where it was.
    assert step(watched, 102, rise=0.5) is not None
    assert step(watched, 103) is None
    assert step(watched, 104, rise=-1.0) is None


def test_nothing_is_judged_before_a_window_has_been_seen() -> None:
    watched = watch(guard(), 9)
    assert step(watched, 50, rise=3.0) is None
    watched = watch(guard(), 10)
    assert step(watched, 50, rise=3.0) is not None


@pytest.mark.parametrize("sigma", [1.0, 1000.0])
def test_sigma_is_the_bound(sigma: float) -> None:
    watched = watch(guard(sigma=sigma), 10)
    assert (step(watched, 50, rise=0.3) is not None) == (sigma == 1.0)


def test_an_unknown_domain_is_not_compared() -> None:
    watched = guard()
    for number in range(20):
        step(watched, number, share=1.0)
    assert step(watched, 50, share=0.5) is None
    assert step(watched, 51, share=1.0, rise=1.0) is not None


def test_stop_and_skip_end_the_run_with_numbers() -> None:
    with pytest.raises(SpikeError, match=r"step 50: the loss is 4\.\d+ where 3\.\d+ ± 0\.0\d+ was"):
        step(watch(guard("stop")), 50, rise=1.0)
    patient = watch(guard("skip"))
    assert step(patient, 50, rise=1.0) is not None
    assert step(patient, 51) is None
    assert step(patient, 52, rise=1.0) is not None
    with pytest.raises(SpikeError, match="2 in a row") as caught:
        step(patient, 53, rise=1.0)
    assert caught.value.exit_code == 1


def test_a_level_that_stays_is_taken_for_the_new_one() -> None:
    watched = watch(guard())
    spikes = [step(watched, number, rise=1.0) for number in range(100, 130)]
    assert all(spike is not None for spike in spikes[:10])
    assert all(spike is None for spike in spikes[10:])


def test_what_was_judged_before_the_update_holds_after_it() -> None:
    watched = watch(guard("skip"))
    tokens = np.array([500.0, 500.0])
    assert not watched.accepts((LEVELS + 1) * tokens, tokens)
    assert watched.after(50, LEVELS * tokens, tokens) is not None
    assert watched.accepts(LEVELS * tokens, tokens)
    assert watched.after(51, (LEVELS + 1) * tokens, tokens) is None


def test_a_state_goes_on_where_it_was_taken() -> None:
    straight, before = guard(), guard()
    for number in range(25):
        step(straight, number)
        step(before, number)
    state = json.loads(json.dumps(before.state_dict()))
    resumed = guard(domains=["hard", "new", "easy"])
    resumed.load_state_dict(state)
    resumed = guard()
    resumed.load_state_dict(state)
    for number in range(25, 40):
        step(straight, number, rise=float(number == 30))
        step(resumed, number, rise=float(number == 30))
    assert straight.state_dict() == resumed.state_dict()


def test_the_run_goes_back_so_often_and_no_more() -> None:
    watched = watch(guard("rollback"))
    spike = step(watched, 50, rise=1.0)
    assert spike is not None
    watched.count_rollback(50, spike, "global_step40")
    assert step(watched, 51, rise=1.0) is None  # the level is learnt anew
    watched.count_rollback(70, spike, "global_step40")
    with pytest.raises(SpikeError, match="gone back to global_step40 2 times"):
        watched.count_rollback(90, spike, "global_step40")
    watched.count_rollback(110, spike, "global_step100")


def test_both_guards_in_one() -> None:
    said: list[str] = []
    nonfinite = NonFiniteGuard(limit=0, loss_scaling=False, domains=NAMES)
    plan = Plan(
        step=50,
        domain=np.zeros(2, dtype=np.int32),
        epoch=np.zeros(2, dtype=np.int64),
        sample=np.arange(2),
        weights=np.array([0.5, 0.5]),
    )

    def totals(rise: float) -> StepTotals:
        tokens = np.array([500.0, 500.0])
        return StepTotals(
            loss_sum=(LEVELS + rise) * tokens,
            token_count=tokens,
            square_sum=tokens,
            sample_count=tokens,
            skipped=False,
            stop=False,
        )

    plain = RunGuard(nonfinite)
    assert not plain.check(plan, totals(9.0))
    assert plain.state_dict() == nonfinite.state_dict()
    warned = RunGuard(nonfinite, watch(guard()), say=said.append)
    assert not warned.check(plan, totals(1.0))
    assert said[0].startswith("warning: step 50: the loss is ")
    skipping = RunGuard(nonfinite, watch(guard("skip")), say=said.append)
    assert skipping.check(plan, totals(1.0))
    assert "step 50 is left out" in said[1]
    back = RunGuard(nonfinite, watch(guard("rollback")), say=said.append)
    back.go_back = lambda step, count: count("global_step40") or "global_step40"
    assert back.check(plan, totals(1.0))
    assert "those of global_step40 again" in said[2]
    other = RunGuard(nonfinite, guard("rollback"))
    other.load_state_dict(back.state_dict())
    assert other.state_dict() == back.state_dict()
    # With and without such a policy the states fit each other.
    other.load_state_dict(plain.state_dict())
    plain.load_state_dict(back.state_dict())


@pytest.mark.parametrize(
    ("text", "policy"),
    [("off", ("off", 0)), (False, ("off", 0)), ("Warn", ("warn", 0)), ("stop", ("stop", 0)),
     ("skip( 3 )", ("skip", 3)), ("ROLLBACK(12)", ("rollback", 12))],
)  # fmt: skip
def test_policies_by_their_words(text: Any, policy: tuple[str, int]) -> None:
    assert TrainingConfig(train_iters=1, on_loss_spike=text).spike_policy == policy
    assert split_policy("skip(3)") == ("skip", 3)


@pytest.mark.parametrize("text", ["skip", "skip(0)", "rollback()", "halt", True, 3, "off(1)"])
def test_other_words_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"on_loss_spike|off|string"):
        TrainingConfig(train_iters=1, on_loss_spike=text)
