"""Methods that read references, gradients and held-out batches, in worlds whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from data_sampling_utils import RunContext, build_mixer
from megatron.mixing.simulate import Multinomial, simulate
from megatron.mixing.simulated_signals import SimulatedSignals
from megatron.mixing.worlds import LinearWorld, PowerWorld, power_world, random_linear


def learnable():
    """Noise, which nothing can learn; a domain with much to learn; one that is learnt at once."""
    return PowerWorld(
        epsilon=np.array([6.0, 1.0, 0.5]),
        beta=np.array([0.01, 12.0, 3.0]),
        alpha=np.array([0.3, 0.3, 1.2]),
        transfer=np.eye(3),
        batch=64,
        offset=20.0,
    )


def doremi(world, **options):
    return build_mixer(
        "doremi",
        domains=list(world.domains),
        context=RunContext(vocab_size=1000),
        reference="simulated",
        **options,
    )


@pytest.mark.parametrize("loss_lag", [0, 1])
@pytest.mark.parametrize("excess", ["token", "domain"])
def test_doremi_finds_what_can_be_learnt_and_leaves_noise_alone(loss_lag, excess):
    world = learnable()
    mixer = doremi(world, loss_lag=loss_lag, excess=excess, eta=0.05)
    run = simulate(mixer, world, steps=400, batch=64, noise=0.3)
    mixture = run.result
    assert mixture.sum() == pytest.approx(1)
    assert mixture.argmax() == 1
    assert mixture[0] < 1 / 3 < mixture[1]
    # The draw is untouched; only what a loss counts has moved.
    np.testing.assert_allclose(run.weights, 1 / 3)
    assert np.abs(run.drawn - 400 * 64 / 3).max() < 2


def test_doremi_moves_nothing_where_the_reference_is_as_bad():
    world = learnable()
    mixer = doremi(world, smoothing=0.0)
    signals = SimulatedSignals(world, mixer, steps=50, reference=np.full(3, 100.0))
    run = simulate(mixer, world, steps=50, batch=64, signals=signals)
    np.testing.assert_allclose(run.result, 1 / 3, atol=1e-12)


def test_a_step_trains_on_what_the_losses_count():
    """Twice the weight in the loss is twice the share of what is learnt from."""
    seen = []

    class Watched(LinearWorld):
        def train(self, shares):
            seen.append(shares)
            super().train(shares)

    world = Watched(start=np.full(3, 5.0), matrix=np.eye(3) * 1e-3, half_life=None)
    mixer, steps = doremi(world), []
    simulate(
        mixer,
        world,
        steps=20,
        batch=30,
        signals=SimulatedSignals(world, mixer, steps=20, reference=np.array([3.0, 4.0, 5.0])),
        on_step=lambda step, decision, counts: steps.append((decision, counts)),
    )
    for shares, (decision, counts) in zip(seen, steps, strict=True):
        weighted = decision.loss_weights * counts
        np.testing.assert_allclose(shares, weighted / weighted.sum())
    assert seen[-1][0] > seen[-1][1] > seen[-1][2]


MATRIX = np.array(
    [
        [3.0, 0.0, 1.0, 0.0],
        [0.0, 2.0, 1.5, 0.2],
        [0.0, 0.0, 2.0, 0.0],
        [0.0, 2.5, 1.0, 1.0],
    ]
)
"""Domain 2 helps most in all, domain 1 domain 3 most, and each row's own is known."""


@pytest.mark.parametrize(
    ("options", "best"),
    [
        ({}, 2),
        ({"target": "all"}, 2),
        ({"objective": {"d3": 1.0}}, 1),
        ({"objective": {"d0": 1.0}}, 0),
        ({"objective": {"d0": 1.0, "d3": 3.0}}, 1),
    ],
)
def test_doge_finds_the_domain_that_helps_the_objective(options, best):
    world = LinearWorld(start=np.full(4, 7.0), matrix=2e-4 * MATRIX, half_life=None)
    mixer = build_mixer("doge", domains=list(world.domains), **options)
    run = simulate(mixer, world, steps=600, batch=64, noise=0.3)
    last = mixer.describe()["domain_weights"]
    assert last[f"d{best}"] > 0.9
    assert run.result.argmax() == best
    np.testing.assert_allclose(run.weights, 0.25)


@pytest.mark.parametrize("seed", range(4))
def test_doge_ends_near_the_best_fixed_mixture_of_a_linear_world(seed):
    world = random_linear(6, seed=seed, half_life=2000)
    best = world.best_fixed(2000)
    run = simulate(build_mixer("doge", domains=list(world.domains)), world, steps=2000)
    assert run.result.argmax() == best.weights.argmax()
    uniform = simulate(build_mixer("static", domains=list(world.domains)), world, steps=2000)
    assert run.final - best.value < 0.5 * (uniform.final - best.value)


def test_the_slopes_are_the_falls_of_a_small_step():
    for world in (power_world(transfer=np.eye(7) + 0.1), random_linear(7, seed=3, half_life=9.0)):
        for share in np.eye(7)[:3]:
            world.train(share)
        slopes = world.slopes()
        for domain, alone in enumerate(np.eye(7)):
            before = world.losses()
            copy = type(world).__new__(type(world))
            copy.__dict__.update(world.__dict__)
            copy.train(1e-6 * alone)
            fall = (before - copy.losses()) / 1e-6
            np.testing.assert_allclose(fall, slopes[:, domain], rtol=1e-3, atol=1e-8)


def gap_mixer(world, **options):
    context = RunContext(draws_per_step=256)
    return build_mixer("validation_gap", domains=list(world.domains), context=context, **options)


@pytest.mark.parametrize("importance", ["probability", "inclusion"])
def test_the_validation_gap_draws_more_of_what_generalises_worse(importance):
    world = power_world()
    mixer = gap_mixer(world, importance=importance)
    gap = np.array([0.0, 0.0, 0.6, 0.0, 0.3, 0.0, 0.0])
    signals = SimulatedSignals(world, mixer, steps=2000, gap=gap)
    draw = Multinomial(256, seed=1)
    run = simulate(mixer, world, steps=2000, draw=draw, noise=0.5, signals=signals)
    last = run.weights[-1]
    assert last.argmax() == 2
    assert np.argsort(last)[-2] == 4
    assert run.drawn.argmax() == 2


def test_without_a_gap_it_stays_where_it_was():
    world = power_world()
    mixer = gap_mixer(world)
    run = simulate(mixer, world, steps=200)
    np.testing.assert_allclose(run.weights, 1 / 7, atol=1e-12)
    assert np.isfinite(run.final)
