"""Chips that are not here: the devices of a TPU slice, for compiling only."""

import os
from typing import Any

import jax
from jax.experimental import topologies

from .chips import chip_of
from .errors import RefusedError

# libtpu as a compiler only: do not look for a TPU, and let other processes use libtpu beside this one.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str) -> list[Any]:
    """All devices of a topology such as "v5e:2x4".

    Raises RefusedError for one that does not exist, and without libtpu.
    """
    chip_of(topology)
    try:
        import libtpu  # noqa: F401  (JAX's own message, without it, speaks of platforms)
    except ImportError as error:
        raise RefusedError("planning needs the TPU compiler, libtpu; install it: pip install 'jax[tpu]'") from error
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)  # read when libtpu is loaded, by the call below
    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
