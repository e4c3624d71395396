"""Designs on the simplex."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, free_bounds, make_bounds
from megatron.experiments.designs import dirichlet, grid, one_hot, well_spread

NARROW = Bounds(floor=np.array([0.1, 0.0, 0.05]), ceiling=np.array([0.6, 0.5, 1.0]))
TIGHT = Bounds(floor=np.full(4, 0.2), ceiling=np.array([0.25, 0.26, 0.27, 0.28]))


@pytest.mark.parametrize("bounds", [free_bounds(2), free_bounds(7), NARROW, TIGHT])
def test_every_design_keeps_the_bounds_and_its_seed(bounds):
    for make in (dirichlet, well_spread):
        points = make(bounds, count=30, seed=3)
        assert points.shape == (30, bounds.count)
        assert bounds.contains(points).all()
        assert (points == make(bounds, count=30, seed=3)).all()
        assert (points != make(bounds, count=30, seed=4)).any()
    corners = one_hot(bounds)
    assert bounds.contains(corners).all()
    assert (corners.argmax(axis=1) == np.arange(bounds.count)).all() or bounds is TIGHT


def test_grid_is_complete_and_without_repeats():
    points = grid(free_bounds(3), parts=4)
    assert len(points) == math.comb(6, 2) == len(np.unique(points, axis=0))
    assert set(np.unique(points)) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (points.sum(axis=1) == 1).all()
    assert (one_hot(free_bounds(3)) == np.eye(3)).all()
    assert grid(free_bounds(1), parts=4).tolist() == [[1.0]]


def test_grid_respects_bounds_and_has_the_floors_corners():
    points = grid(NARROW, parts=20)
    assert NARROW.contains(points).all()
    assert np.isclose(points, [0.1, 0.0, 0.9]).all(axis=1).any()
    with pytest.raises(ConfigError, match="raise parts"):
        grid(TIGHT, parts=1)
    with pytest.raises(ConfigError, match="well-spread"):
        grid(free_bounds(20), parts=20)


def nearest(points):
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return apart[~np.eye(len(points), dtype=bool)].min()


def test_well_spread_points_keep_further_apart_than_draws():
    for domains, count in ((2, 8), (3, 16), (7, 32)):
        for seed in range(3):
            spread = nearest(well_spread(free_bounds(domains), count=count, seed=seed))
            drawn = nearest(dirichlet(free_bounds(domains), count=count, seed=seed))
            assert spread > 1.5 * drawn


def merged_plainly(points, count):
    points, mass = list(points), [1.0] * len(points)
    while len(points) > count:
        pairs = [
            (((points[i] - points[j]) ** 2).sum(), i, j)
            for i in range(len(points))
            for j in range(i)
        ]
        _, i, j = min(pairs, key=lambda pair: pair[0])
        merged = (mass[i] * points[i] + mass[j] * points[j]) / (mass[i] + mass[j])
        weight = mass[i] + mass[j]
        for k in (i, j):  # i > j
            del points[k], mass[k]
        points.append(merged)
        mass.append(weight)
    return np.array(points)


def test_merging_takes_the_nearest_pair_each_time():
    draws = dirichlet(free_bounds(3), count=40, seed=5)
    found = well_spread(free_bounds(3), count=8, seed=5, oversample=5)
    expected = merged_plainly(draws, 8)
    order = lambda points: points[np.lexsort(points.T)]  # noqa: E731
    np.testing.assert_allclose(order(found), order(expected), atol=1e-12)


def test_dirichlet_follows_its_prior_and_concentration():
    prior = np.array([0.7, 0.2, 0.1])
    loose = dirichlet(free_bounds(3), count=4000, seed=1, prior=prior)
    np.testing.assert_allclose(loose.mean(axis=0), prior, atol=0.02)
    close = dirichlet(free_bounds(3), count=4000, seed=1, prior=prior, concentration=50.0)
    assert (close.std(axis=0) < 0.3 * loose.std(axis=0)).all()


def test_repetition_becomes_a_ceiling():
    bounds = make_bounds(
        ["a", "b"], max_epochs=4, samples_per_epoch=[100, 1000], samples=1000, floor={"b": 0.1}
    )
    np.testing.assert_allclose(bounds.ceiling, [0.4, 1.0])
    np.testing.assert_allclose(bounds.floor, [0.0, 0.1])
    named = make_bounds(
        ["a", "b"], max_epochs={"a": 2}, samples_per_epoch=[100, 1000], samples=1000
    )
    np.testing.assert_allclose(named.ceiling, [0.2, 1.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"floor": 0.6}, "floors sum to 1.2"),
        ({"ceiling": 0.4}, "ceilings sum to 0.8"),
        ({"floor": {"c": 0.1}}, "c"),
        ({"floor": {"a": 0.5}, "ceiling": {"a": 0.4}}, "not below"),
        ({"max_epochs": 1.0}, "size of each domain"),
        ({"max_epochs": 1.0, "samples_per_epoch": [1, 2], "samples": 10}, "more epochs"),
    ],
)
def test_bounds_that_cannot_be_met_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_bounds(["a", "b"], **given)
