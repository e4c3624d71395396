"""The laws' libraries are an extra: what happens without it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from megatron.errors import MissingExtraError
from megatron.experiments.regression import Regressor, fit_regression
from megatron.experiments.static_law import fit_static_law
from megatron.experiments.statistics import compare_paired

MIXTURES = np.array([[0.0, 1.0], [0.3, 0.7], [0.6, 0.4], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("module", "call", "library"),
    [
        ("scipy.optimize", lambda: fit_static_law(MIXTURES, 1 + MIXTURES), "scipy"),
        ("scipy.stats", lambda: compare_paired({"a": np.ones(3)}, np.zeros(3)), "scipy"),
        (
            "sklearn.ensemble",
            lambda: fit_regression(MIXTURES, 1 + MIXTURES, regressor=Regressor.BOOSTING),
            "scikit-learn",
        ),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, call, library):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{library}'.*neomix\[studies\]"):
        call()
