"""JAX's profiler: what the devices did, and the host threads that drove them."""

from pathlib import Path

import jax


def start(folder: Path) -> None:
    """Traces from now on, into a subfolder named after the time. Raises RuntimeError when a trace runs already."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call of every thread: slows the server and fills the file
    jax.profiler.start_trace(str(folder), profiler_options=options)


def stop() -> None:
    """Writes the trace; may take seconds."""
    jax.profiler.stop_trace()
