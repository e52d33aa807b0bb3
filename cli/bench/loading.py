"""slipstream bench loading: the memory that loading takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flags import JsonFlag, finish


@dataclass(frozen=True, kw_only=True)
class BenchLoading:
    """Measure the host memory that loading takes beyond the weights (bytes); needs no model and no accelerator.

    A checkpoint with random weights is written and loaded, its weights stay in this process's memory.
    """

    shape: str = "llama-3.2-1b"
    """A preset of the Llama family (see `slipstream models`)."""
    stored: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type in the files."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in memory."""
    loop: Literal["scan", "unrolled"] = "scan"
    """`scan` stacks the layers, as on TPUs; `unrolled` keeps an array for each, as on CPUs."""
    tensor_parallel: int = 1
    """Devices that share the weights (devices); the CPU is one, unless XLA_FLAGS makes more of it."""
    folder: Path | None = None
    """Where the checkpoint is written, and removed again (path). Default: where temporary files go."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def run(self) -> int:
        from ...benchmarks.loading import LoadingPlan, run

        fields = {name: value for name, value in vars(self).items() if name != "as_json"}
        return finish(run(LoadingPlan(**fields)), self.as_json)
