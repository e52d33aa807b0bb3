"""The cores of the chips that kernels are compiled for, and how fast they are."""

from dataclasses import dataclass

from ...engine_impl.compiler.chips import CHIPS


@dataclass(frozen=True)
class Core:
    """What runs one kernel's grid."""

    topology: str
    clock: float
    """cycles a second: peak bf16 operations over what the MXUs of a core do in a cycle, 2 * 128 * 128 each on four, so
    1.5 GHz on v5e (four MXUs: https://cloud.google.com/tpu/docs/v5e). v4: 1.05 GHz, as in arXiv:2304.01433, table 4.
    v6e: four times as large MXUs, of which the documentation counts two or four; the compiler estimates a 4096**3
    product at 301,616 cycles, which two cannot do, and four at 1.75 GHz make the data sheet's peak."""
    per_device: int
    """cores of a JAX device, which share its HBM and the slots of the grid"""
    delay_slots: int = 4
    """bundles that are issued behind a branch whether it is taken or not"""

    def dma_cycles(self, chip: str, nbytes: int) -> int:
        """Cycles for `nbytes` at this core's share of the bandwidth."""
        return round(nbytes / (CHIPS[chip].hbm_bandwidth / self.per_device) * self.clock)


CORES = {
    "v5e": Core("v5e:2x2", 1.5e9, 1),
    "v6e": Core("v6e:2x2", 1.75e9, 1),
    "v5p": Core("v5p:2x2x1", 1.75e9, 2),
    "v4": Core("v4:2x2x1", 1.05e9, 1, delay_slots=1),
}
