"""A process that writes a checkpoint, loads it, and prints how much memory that took beyond the weights (JSON, bytes).

python -m tests.engine_impl.weights.loading_memory scan FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import cast

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")

import jax
import numpy as np
from safetensors.numpy import save_file
from slipstream.engine_impl import assembly
from slipstream.engine_impl.checkpoints.safetensors import INDEX, SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.forward import LayerLoop
from slipstream.engine_impl.loading import build_engine

LAYERS, VOCABULARY, DIM, FFN = 16, 32768, 1024, 8192
CONFIG = {
    "model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 64, "hidden_size": DIM, "intermediate_size": FFN, "vocab_size": VOCABULARY, "rope_theta": 10000.0,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
MATRICES = {
    **{f"self_attn.{name}_proj": (DIM, DIM) for name in "qkvo"},
    **{f"mlp.{name}_proj": (FFN, DIM) for name in ("gate", "up")},
    "mlp.down_proj": (DIM, FFN),
}


def write(folder: Path) -> int:
    """A file per layer, so that one layer is in memory at a time. Returns the largest tensor's bytes."""

    def matrix(*shape: int) -> np.ndarray:
        return np.resize(np.linspace(-0.02, 0.02, 4099, dtype=jax.numpy.bfloat16), shape)

    norm = np.ones(DIM, jax.numpy.bfloat16)
    embedding = matrix(VOCABULARY, DIM)
    files = {"outer": {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}}
    weight_map = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        norms = {f"{prefix}{name}_layernorm.weight": norm for name in ("input", "post_attention")}
        files[f"layer{layer}"] = norms | {f"{prefix}{name}.weight": matrix(*shape) for name, shape in MATRICES.items()}
        name, tensors = files.popitem()
        save_file(tensors, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    save_file(files["outer"], folder / "outer.safetensors")
    weight_map |= dict.fromkeys(files["outer"], "outer.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return embedding.nbytes


def memory(field: str) -> int:
    """A field of /proc/self/status (bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(loop: LayerLoop, folder: Path) -> dict[str, int]:
    """On a CPU the weights stay in this process: the peak counts, mapped file pages included, less all that remains."""
    largest = write(folder)
    checkpoint = SafetensorsCheckpoint(folder, "test")
    assembly.layer_loop_for = lambda platform, *models: loop
    engine = build_engine(EngineConfig(dtype="bfloat16", tensor_parallel=4, platform="cpu"), checkpoint)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    params = jax.block_until_ready(engine.parameters.load(checkpoint))
    peak = memory("VmHWM") - before
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(params)}.values()
    weights = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return {"weights": weights, "largest": largest, "peak": peak, "beyond": peak - weights}


if __name__ == "__main__":
    print(json.dumps(measure(cast(LayerLoop, sys.argv[1]), Path(sys.argv[2]))))
