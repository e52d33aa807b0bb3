"""What devices can do by their makers' word, found by JAX's name of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ...engine_impl.compiler.chips import CHIPS, GPUS, Chip


class Peak(NamedTuple):
    """Of one JAX device."""

    bandwidth: float
    """bytes a second"""
    bf16_flops: float
    """dense operations a second"""

    @classmethod
    def of(cls, chip: Chip) -> "Peak":
        return cls(chip.hbm_bandwidth, chip.bf16_flops)


PEAKS = {
    "TPU v4": Peak.of(CHIPS["v4"]),
    "TPU v5 lite": Peak.of(CHIPS["v5e"]),
    "TPU v5": Peak.of(CHIPS["v5p"]),
    "TPU v6 lite": Peak.of(CHIPS["v6e"]),
    "TPU7x": Peak.of(CHIPS["tpu7x"]),
    "NVIDIA H100 80GB HBM3": Peak.of(GPUS["h100"]),
    # GPUs that no program is compiled for without one: NVIDIA's data sheets, rates without sparsity.
    "NVIDIA A100-SXM4-40GB": Peak(1555e9, 312e12),
    "NVIDIA A100-SXM4-80GB": Peak(2039e9, 312e12),
    "NVIDIA H200": Peak(4800e9, 989e12),
    "NVIDIA L4": Peak(300e9, 121e12),
}


def datasheet_bandwidth(device: Any) -> float | None:
    """Bytes a second of one device; None for CPUs and devices that are not in the table."""
    peak = PEAKS.get(device.device_kind)
    return None if peak is None else peak.bandwidth


def datasheet_flops(device: Any, dtype: jnp.dtype) -> float | None:
    """Dense bfloat16 operations a second of one device; None for other types, for CPUs and for devices that are not in
    the table."""
    peak = PEAKS.get(device.device_kind)
    return None if peak is None or dtype != jnp.bfloat16 else peak.bf16_flops
