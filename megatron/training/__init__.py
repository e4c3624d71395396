"""Training: the composition root, the one loop, and what surrounds it."""
