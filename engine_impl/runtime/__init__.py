"""JAX's compile cache and profiler, and where the time of a start goes."""
