"""Tiny Hugging Face folders, whole or damaged."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file
from slipstream.engine_impl.checkpoints.hf_config import read_hf_config
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.weights.load import needed_shapes

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_size": 32, "intermediate_size": 48, "vocab_size": 259, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_tensors(config=CONFIG, dtype: DTypeLike = np.float32):
    """What a checkpoint of this config holds, by its Hugging Face names."""
    rng, fields = np.random.default_rng(0), registry.read_config(config, "test")
    shapes = needed_shapes(registry.build(fields), fields.num_kv_heads)
    return {
        name if name.startswith("lm_head") else f"model.{name}": (rng.normal(size=shape) / 4).astype(dtype)
        for name, shape in shapes.items()
    }


def write_folder(folder: Path, *, tensors=None, config=CONFIG, files=1) -> Path:
    """A folder with a config and weights in so many files; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_hf_config(folder)
    return folder
