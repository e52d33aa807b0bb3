"""The machine that a number was taken on: its memory bandwidth and its versions."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from ...engine_impl.errors import RefusedError

COPIED_BYTES = {"cpu": 512 * 2**20}
"""Size of the array that is copied, by platform (bytes): far beyond any cache."""
COPIED_BYTES_ELSEWHERE = 2 * 2**30
REPEATS = 24

BUSY = 0.5
"""Load average beyond which times are not to be trusted (processes)."""


def use_threads(threads: int | None) -> int:
    """Limit this process to so many CPU cores, torch too; before JAX starts its thread pool. Returns how many it uses.

    None leaves it as it is: all cores that the process may use. Raises RefusedError for more than those.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if threads > len(allowed):
            raise RefusedError(f"{threads=} must be at most {len(allowed)}, the cores that this process may use")
        os.sched_setaffinity(0, allowed[:threads])
    used = len(os.sched_getaffinity(0))
    import torch

    torch.set_num_threads(used)
    return used


def warn_if_busy(load_average: Callable[[], tuple[float, ...]] = os.getloadavg) -> float:
    """The last minute's load average; one line on stderr when others are using the CPU.

    Baselines suffer from neighbours more than we do: a torch thread that waits for its sibling waits for the scheduler.
    """
    load = load_average()[0]
    if load > BUSY:
        print(f"warning: load average {load:.1f}: others use this CPU, do not trust times or ratios", file=sys.stderr)
    return load


@contextmanager
def compiling_anew() -> Iterator[None]:
    """No program comes from the folder of compiled ones, or a compile time would be the disk's.

    JAX decides once whether it uses the folder, and heeds its own flag again after a reset only.
    """
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def copy_bandwidth(device: Any) -> float:
    """Bytes a second that one device reads and writes together when it copies an array: the best of two dozen copies.

    No copy waits for fresh memory pages: the target is there before. Decode reads much and writes little; where reading
    alone is faster than copying, an MBU against this number could pass 1.
    """
    nbytes = COPIED_BYTES.get(device.platform, COPIED_BYTES_ELSEWHERE)
    seconds = _memcpy_seconds(nbytes) if device.platform == "cpu" else _copy_seconds(device, nbytes)
    return 2 * nbytes / min(seconds)


def _memcpy_seconds(nbytes: int) -> list[float]:
    """By every core a share: memcpy's stores pass the caches by, while a loop as XLA compiles it reads each line of the
    target before it writes it, and so would make the memory look half as slow again, and our MBU better."""
    cores = len(os.sched_getaffinity(0))
    sources, targets = (np.array_split(np.full(nbytes // 4, value, np.float32), cores) for value in (1, 0))
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            seconds.append(time.perf_counter() - start)
    return seconds


def _copy_seconds(device: Any, nbytes: int) -> list[float]:
    def negate_into(target: jax.Array, source: jax.Array) -> jax.Array:
        return target.at[:].set(-source)  # negated, or the compiler would find nothing to do

    copy = jax.jit(negate_into, donate_argnums=0, keep_unused=True)  # unused but for its memory
    with jax.default_device(device):
        source, target = jnp.ones(nbytes // 4, jnp.float32), jnp.zeros(nbytes // 4, jnp.float32)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            target = copy(target, source).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return seconds


def describe(threads: int) -> dict[str, Any]:
    """What a number needs beside it: device, CPU, threads, versions, date."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: version(name) for name in ("slipstream-llm", "jax", "torch", "transformers")}
        | {"python": platform.python_version()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def describe_client() -> dict[str, Any]:
    """What the numbers of a server elsewhere need beside them: this CPU, how busy it is, our version, the date."""
    return {
        "cpu": cpu_name(),
        "load_average": warn_if_busy(),
        "slipstream-llm": version("slipstream-llm"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def cpu_name(read: Callable[[], str] = lambda: Path("/proc/cpuinfo").read_text()) -> str:
    """The CPU's model name, as Linux gives it."""
    try:
        names = [line.split(":", 1)[1].strip() for line in read().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
