"""A folder as the hub has them, with random weights: a Llama of any size."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...engine_impl.errors import RefusedError
from ...engine_impl.models import registry
from ...engine_impl.text.tokenizer import BYTES_OF_CHARACTER, byte_level_bpe
from ...engine_impl.weights.load import needed_shapes

GIB = 2**30
SHAPE = {
    "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048,
    "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 1,
}  # fmt: skip
"""TinyLlama's, but for the number of layers."""
INDEX = "model.safetensors.index.json"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""Of chats, which `generate` asks for."""


def write_checkpoint(folder: Path, gib: float, dtype: torch.dtype, shape: dict[str, Any] = SHAPE) -> Path:
    """A Llama of about so many GiB, one file for each layer. All layers have the weights of the first: drawing them all
    would take longer than what is measured. Returns the folder.

    Raises RefusedError for fewer bytes than a layer, the embedding and the head have.
    """
    model = registry.build(registry.read_config(shape | {"num_hidden_layers": 1}, "a random checkpoint"))
    of_one = needed_shapes(model, shape["num_key_value_heads"])
    layer = {name: size for name, size in of_one.items() if name.startswith("layers.0.")}
    outer = {name: size for name, size in of_one.items() if name not in layer}
    layers = int((gib * GIB / dtype.itemsize - _elements(outer)) // _elements(layer))
    if layers < 1:
        least = (_elements(outer) + _elements(layer)) * dtype.itemsize / GIB
        raise RefusedError(f"random_gib={gib} is less than a model of one layer has; give at least {least:.2f}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    byte_level_bpe(sorted(BYTES_OF_CHARACTER), [], split="gpt-2", control_ids=[]).save(str(folder / "tokenizer.json"))
    values, weight_map = {name: _drawn(size, dtype) for name, size in of_one.items()}, {}
    for number in range(layers + 1):  # the last one is what is no layer's
        names = outer if number == layers else layer
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        stored = {_hub_name(name.replace("layers.0.", f"layers.{number}.")): values[name] for name in names}
        save_file(stored, folder / file)
        weight_map |= dict.fromkeys(stored, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _elements(sizes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(size).numel() for size in sizes.values())


def _drawn(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(size) / 32).to(dtype)


def _hub_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"
