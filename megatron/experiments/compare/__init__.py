"""The comparison of mixing methods at equal budgets, seed by seed."""
