"""Many runs: sweeps, their launchers, and the search."""
