"""Chips that are not here: the devices of a TPU slice or of GPUs, for compiling only."""

import logging
import os
from typing import Any

import jax
from jax.experimental import topologies

from ..errors import RefusedError
from .chips import GPUS, chip_of

# libtpu as a compiler only: do not look for a TPU, and let other processes use libtpu beside this one.
COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# XLA's GpuTargetConfigProto: what its GPU compiler asks a device for where there is one. Limits: the tables of compute
# capability 9.0 in NVIDIA's CUDA C++ Programming Guide; sizes and rates: the H100 SXM's data sheet. XLA reads its
# versions as CUDA and cuDNN of the machine that will run the program.
TARGETS = {
    "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def devices_of(topology: str) -> list[Any]:
    """All devices of a topology such as "v5e:2x4" or "h100:8".

    Raises RefusedError for one that does not exist, and without its compiler.
    """
    chip_of(topology)
    jax.config.update("jax_platforms", "cpu")
    kind, _, shape = topology.partition(":")
    return _gpu_devices(kind, int(shape)) if kind in GPUS else _tpu_devices(topology)


def _tpu_devices(topology: str) -> list[Any]:
    try:
        import libtpu  # noqa: F401  (JAX's own message, without it, speaks of platforms)
    except ImportError as error:
        raise RefusedError("planning needs the TPU compiler, libtpu; install it: pip install 'jax[tpu]'") from error
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)  # read when libtpu is loaded, by the call below
    return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)


def _gpu_devices(kind: str, count: int) -> list[Any]:
    """The compiler is XLA's CUDA plugin, which needs neither a driver nor NVIDIA's libraries to compile."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only: that there is no driver is no news here
    logging.getLogger("jax_plugins.xla_cuda12").setLevel(logging.ERROR)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{count}", target_config=TARGETS[kind]
        )  # slices x hosts x devices
    except NotImplementedError as error:  # no plugin of that name
        raise RefusedError(
            f"planning for GPUs needs their compiler; install it: pip install jax-cuda12-pjrt=={jax.__version__}"
        ) from error
    return list(described.devices)
