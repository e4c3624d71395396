"""Every method gets the steps that the baseline's FLOPs pay for."""

from __future__ import annotations

import pytest
from support import compared

from megatron.errors import ConfigError
from megatron.model.accounting import forward_flops, training_flops

METHODS = {
    **compared.UNIFORM,
    "odm": {"mixing": {"method": "odm"}},
    "naive": {"mixing": {"method": "naive_validation", "update_every": 5}},
    "aioli": {"mixing": {"method": "aioli", "lp_rounds": 1, "lp_steps": 2, "update_every": 20}},
    "gap": {"mixing": {"method": "validation_gap"}},
    "doremi": {"stages": "doremi", "mixing": {"method": "doremi"}},
    "ahead": {"stages": "doremi", "mixing": {"method": "doremi", "loss_lag": 0}, "share": 0.3},
    "doge": {"stages": "proxy", "mixing": {"method": "doge"}},
    "small": {
        "stages": "proxy",
        "mixing": {"method": "doge"},
        "proxy_set": {"hidden_size": 8, "num_attention_heads": 1},
    },
    "skillit": {"stages": "skillit", "mixing": {"method": "skillit", "update_every": 10}},
    "regmix": {"stages": "sweep", "fit": "regmix", "points": 5},
    "after": {
        "prior": "doge",
        "mixing": {"method": "aioli", "lp_rounds": 1, "lp_steps": 2, "update_every": 20},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("budget")


@pytest.fixture(scope="module")
def equal(folder):
    return compared.league(folder, {"methods": METHODS})


@pytest.fixture(scope="module")
def model(equal):
    entry = equal.entry("t", "uniform")
    spec = equal.configs["t"].model
    return entry.plan.final.charges.training, spec


@pytest.mark.parametrize("method", METHODS)
def test_all_of_it_costs_what_the_baseline_costs_and_never_more(equal, method):
    entry = equal.entry("t", method)
    budget = equal.budgets["t"]
    total = entry.plan.charges.total
    assert total <= budget * (1 + 1e-9)
    # One more step of the run that counts, with what is measured for it, would be too much.
    step = budget / compared.STEPS
    most = {"naive": 4.0, "skillit": 4.0, "aioli": 4.0, "after": 4.0}.get(method, 2.0)
    assert total > budget - most * step


def test_steps_are_those_that_the_prices_leave(equal, model):
    budget, spec = model
    tokens = compared.BATCH_TOKENS
    step = training_flops(spec, tokens)
    assert budget == pytest.approx(compared.STEPS * step)
    assert equal.entry("t", "odm").plan.final.steps == compared.STEPS

    # A pass over 32 windows of each of three domains after every fifth step.
    naive = equal.entry("t", "naive").plan.final
    passes = forward_flops(spec, 3 * 32 * 16)
    assert naive.charges.validation == pytest.approx((naive.steps - 1) // 5 * passes)

    # Validation of as many samples as the step has, forward; see the method.
    gap = equal.entry("t", "gap").plan.final
    assert gap.charges.foresight == pytest.approx(gap.steps * forward_flops(spec, tokens))
    assert gap.steps == int(compared.STEPS * 3 / 4)


def test_a_chain_is_charged_for_reference_and_proxy(equal, model):
    _, spec = model
    step = training_flops(spec, compared.BATCH_TOKENS)
    plan = equal.entry("t", "doremi").plan
    reference, proxy = plan.leg("reference"), plan.leg("proxy")
    # n (1 + 1 + 1/3) of 30 steps: 12.
    assert (reference.steps, proxy.steps, plan.final.steps) == (12, 12, 32)
    assert plan.charges.references == pytest.approx(12 * step)
    assert plan.charges.proxies == pytest.approx(12 * step * 4 / 3)
    ahead = equal.entry("t", "ahead").plan.leg("proxy")
    assert ahead.charges.foresight == pytest.approx(ahead.steps * step / 3)
    doge = equal.entry("t", "doge").plan.leg("proxy")
    assert doge.charges.foresight == pytest.approx(2 * doge.steps * step)  # forward and backward
    assert equal.entry("t", "small").plan.leg("proxy").steps > doge.steps
    assert equal.entry("t", "skillit").plan.leg("one-hot").count == 3
    after = equal.entry("t", "after").plan
    assert after.search == equal.entry("t", "doge").plan.search
    assert after.final.steps < equal.entry("t", "doge").plan.final.steps


def test_the_settings_of_the_aioli_paper_put_the_search_on_top(folder):
    for setting, extra, steps in (("restricted", 0.5, 10), ("unrestricted", 10.0, 60)):
        league = compared.league(
            folder,
            {
                "methods": {name: METHODS[name] for name in ("uniform", "doge", "skillit")},
                "budget": {"setting": setting},
            },
        )
        for name in ("uniform", "doge", "skillit"):
            entry = league.entry("t", name)
            assert entry.plan.final.steps == compared.STEPS
            spent = sum(leg.count * leg.charges.total for leg in entry.plan.search)
            assert spent <= extra * league.budgets["t"] * (1 + 1e-9)
        assert league.entry("t", "doge").plan.leg("proxy").steps == steps


@pytest.mark.option("eval_interval")
def test_a_guardrail_pays_for_the_reports_that_it_acts_on(folder, model):
    _, spec = model
    guarded = {"method": "odm", "guardrail": {}}
    league = compared.league(
        folder,
        {"methods": {**compared.UNIFORM, "guarded": {"mixing": guarded}}},
        eval_interval=20,
    )
    final = league.entry("t", "guarded").plan.final
    windows = 3 * 8  # eval_iters 1 of 8 samples
    reports = 1 + -(-final.steps // 20)
    assert final.charges.validation == pytest.approx(reports * forward_flops(spec, windows * 16))


def test_a_decay_given_in_steps_follows_the_run(folder):
    league = compared.league(
        folder, {"methods": METHODS, "tasks": {"t": {"configs": "base.yml"}}}, lr_decay_iters=50
    )
    entry = league.entry("t", "doremi")
    wanted = next(entry.contestant.chain(1))[0]
    variant = league.variant(entry, wanted, 1)
    assert "lr_decay_iters=10" in variant.overrides  # 12 of 60 steps
    same = league.variant(
        league.entry("t", "odm"), next(league.entry("t", "odm").contestant.chain(1))[0], 1
    )
    assert not any("lr_decay_iters" in text for text in same.overrides)


REFUSED = {
    "no step": (
        {"d": {"stages": "sweep", "points": 8, "share": 0.1}},
        {"train_iters": 4},
        "method 'd': .* do not pay for one step of each of the 8 runs",
    ),
    "law": (
        {"d": {"stages": "sweep", "fit": "law", "points": 4}},
        {},
        "method 'd': a sweep of 4 points is too little for fit: law and 3 domains; .* 5 at least",
    ),
    "options": (
        {"d": {"mixing": {"method": "aioli", "update_every": 4}}},
        {},
        "task 't', method 'd': .*update_every",
    ),
    "no test data": ({}, {"split": "90,10,0"}, "task 't': domain 'walk' has no test data"),
    "nothing measured": ({}, {"eval_iters": 0}, "task 't': eval_iters is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_before_a_run_starts(folder, case):
    methods, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        compared.league(folder, {"methods": {**compared.UNIFORM, **methods}}, **changes)


def test_an_entropy_of_no_domain_is_refused(folder):
    task = {"configs": "base.yml", "entropies": {"walk": 1.0, "wlak": 1.0}}
    with pytest.raises(ConfigError, match="entropies names 'wlak'"):
        compared.league(folder, {"methods": compared.UNIFORM, "tasks": {"t": task}})
