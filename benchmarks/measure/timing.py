"""How long a call takes until its result is there."""

import time
from collections.abc import Callable

import jax


def timed(call: Callable[[], jax.Array], repeats: int) -> list[float]:
    """Microseconds of each call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e6)
    return times[2:]
