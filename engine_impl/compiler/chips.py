"""Chips: what a JAX device of each kind has, and the topologies that its compiler knows.

A JAX device is a chip, but for TPU v4 and v7x, where it is one of a chip's two halves; all numbers are a device's.
"""

from dataclasses import dataclass

from ..errors import RefusedError

GIB = 2**30
GPU_MEMORY_SHARE = 0.92
"""Of a GPU's memory, for JAX to take at its start; the rest is for CUDA, its libraries and captured graphs."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device."""

    hbm_bytes: int
    """What a program may use (bytes). TPUs: the limit in libtpu 0.0.42's out-of-memory message. GPUs: JAX's share."""
    hbm_bandwidth: float
    """bytes a second. TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each generation.
    GPUs: NVIDIA's data sheet, rates without sparsity."""
    bf16_flops: float
    """operations a second; same source"""
    int8_ops: float
    """int8 x int8 operations a second; same source, and bf16_flops where it names no other rate"""
    topologies: tuple[str, ...]
    """GPUs: how many in one machine"""


CHIPS = {
    "v4": Chip(
        hbm_bytes=int(15.25 * GIB), hbm_bandwidth=1200e9 / 2, bf16_flops=275e12 / 2, int8_ops=275e12 / 2,
        topologies=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    ),
    "v5e": Chip(
        hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, bf16_flops=197e12, int8_ops=393e12,
        topologies=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Chip(
        hbm_bytes=int(95.74 * GIB), hbm_bandwidth=2765e9, bf16_flops=459e12, int8_ops=918e12,
        topologies=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    ),
    "v6e": Chip(
        hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1638e9, bf16_flops=918e12, int8_ops=1836e12,
        topologies=("2x2", "2x4", "4x4", "4x8", "8x8", "16x16"),
    ),
    "tpu7x": Chip(
        hbm_bytes=int(94.75 * GIB), hbm_bandwidth=7400e9 / 2, bf16_flops=2307e12 / 2, int8_ops=2307e12 / 2,
        topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    ),
}  # fmt: skip
GPUS = {
    "h100": Chip(
        hbm_bytes=int(84_929_347_584 * GPU_MEMORY_SHARE), hbm_bandwidth=3350e9, bf16_flops=989e12, int8_ops=1979e12,
        topologies=("1", "2", "4", "8"),
    ),
}  # fmt: skip


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:2x4" or "h100:1".

    Raises RefusedError for one that does not exist, listing those that do.
    """
    kind, _, shape = topology.partition(":")
    chips = CHIPS | GPUS
    chip = chips.get(kind)
    if chip is None or shape not in chip.topologies:
        known = "; ".join(f"{name}:{{{','.join(chip.topologies)}}}" for name, chip in chips.items())
        raise RefusedError(f"topology={topology!r} does not exist; those that do: {known}")
    return chip
