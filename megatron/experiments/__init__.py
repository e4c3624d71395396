"""Studies of many runs: designs of mixtures, laws fitted to them, statistics and charges."""
