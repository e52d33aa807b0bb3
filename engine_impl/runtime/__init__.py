"""JAX's compile cache and profiler."""
