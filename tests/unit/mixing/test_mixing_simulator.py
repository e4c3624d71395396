"""The simulator: its laws, its optimum, its draws, and that no method beats the optimum."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from data_sampling_utils import available_methods, build_mixer
from megatron.mixing.regret import as_table, compare, methods, worlds
from megatron.mixing.simulate import Apportion, Multinomial, simulate
from megatron.mixing.worlds import LinearWorld, PowerWorld, hub_transfer, power_world, random_linear

DOCS = Path(__file__).parents[3] / "docs" / "mixing.md"


def grid(count, parts):
    for cut in itertools.combinations_with_replacement(range(parts + 1), count - 1):
        edges = (0, *cut, parts)
        yield np.diff(edges) / parts


def small_power():
    return PowerWorld(
        epsilon=np.array([1.0, 0.5, 2.0]),
        beta=np.array([5.0, 20.0, 9.0]),
        alpha=np.array([0.2, 0.5, 0.3]),
        transfer=np.array([[1.0, 0.0, 0.2], [0.5, 1.0, 0.0], [0.0, 0.3, 1.0]]),
        batch=8,
        offset=10.0,
    )


def final(world, p, steps):
    world.reset()
    for _ in range(steps):
        world.train(p)
    return world.losses().mean()


@pytest.mark.parametrize("world", [small_power(), random_linear(3, seed=1, half_life=7.0)])
def test_no_fixed_mixture_is_better_than_the_optimum(world):
    best = world.best_fixed(40)
    assert best.gap <= 1e-10
    assert abs(best.weights.sum() - 1) < 1e-12
    assert final(world, best.weights, 40) == pytest.approx(best.value, abs=1e-12)
    assert min(final(world, p, 40) for p in grid(3, 20)) >= best.value - best.gap - 1e-12
    assert min(final(world, p, 40) for p in grid(3, 20)) <= best.value + 5e-3


def test_the_linear_law():
    matrix = np.array([[0.3, 0.1], [0.0, 0.2]])
    world = LinearWorld(start=np.array([5.0, 4.0]), matrix=matrix, half_life=2.0)
    for share in ([1.0, 0.0], [0.25, 0.75], [0.5, 0.5]):
        world.train(np.array(share))
    np.testing.assert_allclose(
        world.losses(),
        [
            5 - 0.3 - (0.3 * 0.25 + 0.1 * 0.75) / 1.5 - (0.15 + 0.05) / 2,
            4 - 0.0 - (0.2 * 0.75) / 1.5 - 0.1 / 2,
        ],
    )
    world.reset()
    assert world.losses().tolist() == [5.0, 4.0]


def test_the_power_law_with_transfer():
    world = small_power()
    world.train(np.array([0.5, 0.25, 0.25]))
    world.train(np.array([0.0, 1.0, 0.0]))
    n = 10 + 8 * (0.5 * 0.5 + 1.25)
    assert world.losses()[1] == pytest.approx(0.5 + 20 * n**-0.5)


def test_the_apportioned_draw_follows_the_weights_and_closes_its_blocks():
    rng, draw = np.random.default_rng(0), Apportion(7, 16)
    asked, given, step = np.zeros(7), np.zeros(7), 0
    for _ in range(60):
        weights = rng.dirichlet(np.full(7, 0.3))
        counts = draw(step := step + 1, weights, None)
        asked, given = asked + 16 * weights, given + counts
        assert counts.sum() == 16
        assert (counts >= 0).all()
        assert np.abs(asked - given).max() <= 1 + math.log(7)
    for steps in (1, 3, 10):
        weights = rng.dirichlet(np.full(7, 0.5))
        total = sum(
            draw(step := step + 1, weights, steps if number == 0 else None)
            for number in range(steps)
        )
        assert total.sum() == 16 * steps
        assert np.abs(total - 16 * steps * weights).max() < 1
        asked, given = np.zeros(7), np.zeros(7)


def test_runs_are_repeated_exactly_and_noise_is_of_the_seed():
    def run(seed):
        mixer = build_mixer("odm", domains=[f"d{i}" for i in range(7)])
        world = power_world()
        return simulate(mixer, world, steps=60, draw=Multinomial(256, seed=1), noise=1.0, seed=seed)

    first, second, other = run(0), run(0), run(1)
    assert first.losses.tobytes() == second.losses.tobytes()
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.weights.tobytes() != other.weights.tobytes()
    assert first.drawn.sum() == 60 * 256
    assert first.steps.tolist() == list(range(1, 61))


def test_noise_shrinks_with_the_samples_of_the_step():
    world = LinearWorld(start=np.array([2.0, 3.0]), matrix=np.zeros((2, 2)), half_life=None)
    seen = []

    class Watch:
        def decide(self, step):
            return build_mixer("static", domains=["a", "b"], weights=[1, 15]).decide(step)

        def observe(self, observation):
            seen.append(np.array(observation.loss_sum) / np.array(observation.token_count))

    simulate(Watch(), world, steps=1500, batch=64, noise=0.8)
    np.testing.assert_allclose(np.std(seen, axis=0), [0.8 / 2, 0.8 / 60**0.5], rtol=0.08)
    np.testing.assert_allclose(np.mean(seen, axis=0), [2.0, 3.0], atol=0.05)


@pytest.fixture(scope="module")
def entries():
    return compare(steps=600)


def test_every_method_runs_in_every_world_and_none_beats_the_optimum(entries):
    assert {entry.world for entry in entries} == set(worlds())
    for entry in entries:
        assert entry.best.gap <= 1e-9
        assert entry.regret >= -entry.best.gap - 1e-12
        assert np.isfinite(entry.run.losses).all()


def test_the_comparison_leaves_no_method_out():
    world = power_world()
    compared = methods(world, world.best_fixed(100), steps=100, ledger="x")
    assert {method for method, _ in compared.values()} == set(available_methods())


def test_the_table_has_a_row_for_each(entries):
    lines = as_table(entries).splitlines()
    assert lines[0].startswith("| method | separate | transfer | linear |")
    assert len(lines) == 2 + len({entry.label for entry in entries})
    uniform = next(line for line in lines if line.startswith("| static (uniform)"))
    found = [entry.regret for entry in entries if entry.label == "static (uniform)"]
    assert [float(cell) for cell in uniform.split("|")[2:5]] == [round(1e3 * x, 1) for x in found]


def test_the_documentation_shows_every_method():
    """The table in the docs is of the methods that there are; regenerate it with
    ``tools/generate_docs.py --simulate``."""
    text = DOCS.read_text()
    block = text.split("<!-- simulation -->")[1].split("<!-- end of simulation -->")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", block, re.MULTILINE)[1:]
    world = power_world(transfer=hub_transfer())
    assert rows == list(methods(world, world.best_fixed(100), steps=100, ledger="x"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ado", "aioli", "odm", "skillit"])
def test_a_hundred_thousand_steps(method):
    world = power_world(transfer=hub_transfer())
    options = {"skillit": {"update_every": 1000}}.get(method, {})
    mixer = build_mixer(method, domains=list(world.domains), **options)
    run = simulate(mixer, world, steps=100_000, noise=1.0, record_every=1000)
    assert run.drawn.sum() == 256 * 100_000
    assert run.final >= world.best_fixed(100_000).value
