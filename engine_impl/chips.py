"""TPU chips: what a JAX device of each generation has, and the topologies that the compiler knows.

A JAX device is a chip, but for v4 and v7x, where it is one of a chip's two halves; all numbers are a device's.
"""

from dataclasses import dataclass

from .errors import RefusedError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device."""

    hbm_bytes: int
    """What the compiler lets a program use: the limit in libtpu 0.0.42's out-of-memory message (bytes)"""
    hbm_bandwidth: float
    """bytes a second; https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, the page of each generation"""
    bf16_flops: float
    """operations a second; same source"""
    int8_ops: float
    """int8 x int8 operations a second; same source, and bf16_flops where it names no other rate"""
    topologies: tuple[str, ...]


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


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:2x4".

    Raises RefusedError for one that does not exist, listing those that do.
    """
    generation, _, shape = topology.partition(":")
    chip = CHIPS.get(generation)
    if chip is None or shape not in chip.topologies:
        known = "; ".join(f"{name}:{{{','.join(chip.topologies)}}}" for name, chip in CHIPS.items())
        raise RefusedError(f"topology={topology!r} does not exist; those that do: {known}")
    return chip
