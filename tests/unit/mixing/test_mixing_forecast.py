"""How far a fitted forecast may be wrong, against the textbook and where that breaks down."""

import numpy as np
import pytest

from megatron.mixing.forecast import FittedForecast

STEPS = [10, 20, 40, 80, 160]


def test_the_scatter_is_that_of_the_inverted_precision():
    losses = np.array([5.0, 4.2, 3.8, 3.4, 3.2])
    forecast = FittedForecast(STEPS, losses.tolist())
    law, n = forecast._law, np.array(STEPS, dtype=float)

    def slope(at):
        falling = law.beta * at**-law.alpha
        return np.stack((falling, np.ones(len(at)), -np.log(at) * falling), axis=1)

    residual = losses - (law.epsilon + law.beta * n**-law.alpha)
    precision = slope(n).T @ slope(n) / (residual @ residual / 2)
    precision += np.diag((np.array([1.0, 5.0, 1.0]) * [3.0, 1.0, 0.3]) ** -2.0)
    here = slope(np.array([500.0]))[0]
    expected = np.sqrt(here @ np.linalg.inv(precision) @ here)
    assert forecast.scatter(500) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12, 1e150, 1e300])
def test_losses_of_any_size_leave_an_error(scale):
    forecast = FittedForecast(STEPS, [scale * x for x in (1.0, 0.0, 1.0, 1.0, 0.5)])
    assert not np.isnan(forecast.scatter(500))
