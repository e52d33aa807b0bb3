"""How much host memory loading takes beyond the weights themselves: `slipstream bench loading`.

Writes a checkpoint of a preset's shape with random weights, a safetensors file a layer, into a temporary folder, and
loads it as a server does. On a CPU the weights stay in this process's memory, so what counts is the peak of the
resident memory (the kernel's VmHWM, mapped file pages included) less what was there before and less the weights.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from safetensors.numpy import save_file

from ..engine_impl.checkpoints.safetensors import INDEX, SafetensorsCheckpoint
from ..engine_impl.compiler.presets import preset
from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError
from ..engine_impl.forward import LayerLoop
from ..engine_impl.loading import build_engine
from ..engine_impl.models.llama import LlamaConfig
from .measure.models import RandomCheckpoint

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class LoadingPlan:
    """What is written and how it is loaded; see `slipstream bench loading --help`."""

    shape: str
    stored: str
    dtype: Literal["float32", "bfloat16"]
    loop: LayerLoop
    tensor_parallel: int = 1
    folder: Path | None = None


def run(plan: LoadingPlan) -> dict[str, Any]:
    """Measure and tell. Raises RefusedError for a preset that is no Llama, and where there is no /proc (Linux)."""
    told = measure(plan)
    print(
        f"{plan.shape}, {told['checkpoint_bytes'] / MIB:.0f} MiB of {plan.stored} -> {plan.dtype}, {plan.loop}: "
        f"{told['seconds']} s, peak {told['peak_bytes'] / MIB:.0f} MiB = weights {told['weights_bytes'] / MIB:.0f} + "
        f"{told['beyond_weights_bytes'] / MIB:.0f} MiB (largest tensor: {told['largest_tensor_bytes'] / MIB:.0f} MiB)"
    )
    return told


def measure(plan: LoadingPlan) -> dict[str, Any]:
    """Write, load, measure (bytes, seconds)."""
    shape = preset(plan.shape)
    if not isinstance(shape, LlamaConfig):
        raise RefusedError(f"shape={plan.shape!r} must be a Llama's")
    with tempfile.TemporaryDirectory(dir=plan.folder) as name:
        folder = Path(name)
        largest = write(folder, shape, plan.shape, plan.stored)
        checkpoint = SafetensorsCheckpoint(folder, plan.shape)
        config = EngineConfig(dtype=plan.dtype, tensor_parallel=plan.tensor_parallel, platform="cpu")
        engine = build_engine(config, checkpoint)
        engine.layer_loop = plan.loop
        before = reset_peak()
        start = time.perf_counter()
        params = jax.block_until_ready(engine.load_params(checkpoint))
        seconds = time.perf_counter() - start
        peak = memory("VmHWM")
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
    weights = sum({id(leaf): resident(leaf) for leaf in jax.tree.leaves(params)}.values())
    return {
        "shape": plan.shape, "stored": plan.stored, "dtype": plan.dtype, "loop": plan.loop,
        "tensor_parallel": plan.tensor_parallel, "checkpoint_bytes": on_disk, "largest_tensor_bytes": largest,
        "weights_bytes": weights, "peak_bytes": peak - before, "beyond_weights_bytes": peak - before - weights,
        "seconds": round(seconds, 2), "gigabytes_per_second": round(on_disk / seconds / 1e9, 3),
    }  # fmt: skip


def resident(array: jax.Array) -> int:
    """Bytes on all devices, which are all this process."""
    return sum(shard.data.nbytes for shard in array.addressable_shards)


def write(folder: Path, shape: LlamaConfig, name: str, stored: str) -> int:
    """A Hugging Face folder, a file a layer: one layer is in memory at a time. Returns the largest tensor's bytes."""
    values, largest = RandomCheckpoint(shape, name), 0
    weight_map: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    for parameter in values.shapes():
        layer = parameter.split(".")[1] if parameter.startswith("layers.") else parameter.split(".")[0]
        by_file.setdefault(f"model-{layer}.safetensors", []).append(parameter)
    for file, parameters in by_file.items():
        prefixed = {p if p.startswith("lm_head") else f"model.{p}": p for p in parameters}
        tensors = {key: values.tensor(p).astype(jax.numpy.dtype(stored)) for key, p in prefixed.items()}
        largest = max(largest, *(tensor.nbytes for tensor in tensors.values()), 0)
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    fields = {
        "model_type": "llama", "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "hidden_size": shape.model_dim,
        "intermediate_size": shape.ffn_dim, "vocab_size": shape.vocab_size, "rope_theta": 10000.0,
        "max_position_embeddings": shape.context_length, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tied_embeddings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return largest


def reset_peak() -> int:
    """Forget the peak so far; what is resident now (bytes)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RefusedError(f"peak memory needs Linux's /proc/self/clear_refs ({error})") from error
    return memory("VmRSS")


def memory(field: str) -> int:
    """A field of /proc/self/status (bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
