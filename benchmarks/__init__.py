"""Benchmarks and the baselines that they compare with. Loaded only when `slipstream bench` runs."""
