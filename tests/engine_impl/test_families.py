"""Every family against Hugging Face transformers: a tiny random checkpoint that transformers wrote, token by token."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from slipstream.engine_impl import forward
from slipstream.engine_impl.attention import attend_prompt
from slipstream.engine_impl.checkpoints.hf_config import read_hf_config
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.sharding import make_mesh

from .models import greedy

SIZES = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 60, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 101, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
"""Nothing is round: eight chips share four kv heads, and neither divide the ffn nor the vocabulary."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"rope_parameters": DEFAULT, "tie_word_embeddings": True, "intermediate_size": 72}),
    "mistral": ("Mistral", {"rope_parameters": DEFAULT, "sliding_window": 12}),
    "qwen2": ("Qwen2", {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {"rope_parameters": DEFAULT, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"rope_parameters": DEFAULT, "num_key_value_heads": 8}),
    "gemma": ("Gemma", {"rope_parameters": DEFAULT, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "rope_parameters": DEFAULT, "sliding_window": 12, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.5,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "rope_parameters": GEMMA3_ROPES, "sliding_window": 7, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "Mixtral",
        {"rope_parameters": DEFAULT, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 50},
    ),
    "phi3": ("Phi3", {"rope_parameters": DEFAULT, "sliding_window": 12, "num_key_value_heads": 2}),
}  # fmt: skip


@functools.cache
def written_by_transformers(family: str, root: Path) -> tuple[Path, Any]:
    """(a checkpoint's folder, the model whose it is); weights large enough that greedy tokens vary."""
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * (0.3 if "embed" in name else 2) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(root / family)
    return root / family, model


class FolderCheckpoint:
    def __init__(self, folder: Path) -> None:
        self.name, self.config = folder.name, read_hf_config(folder)
        self.tensors = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}

    def tensor(self, name):
        if name == "lm_head.weight" and self.config.tied_embeddings:
            name = "embed_tokens.weight"
        return self.tensors[name]

    def unused(self, names):
        return sorted(set(self.tensors) - names)


def load(folder, devices):
    checkpoint = FolderCheckpoint(folder)
    mesh = make_mesh(jax.devices(), checkpoint.config.num_heads, checkpoint.config.num_kv_heads, devices)
    model = registry.build(replace(checkpoint.config, num_kv_heads=max(checkpoint.config.num_kv_heads, mesh.size)))
    config = EngineConfig(slots=2, cache_length=128, max_prefill_length=64)
    tokenizer: Any = None
    engine = Engine(model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny")
    if devices > 1:
        engine.layer_loop = "scan"  # as on TPUs: a layer's window and rope are selected by its number
    return engine, engine.load_params(checkpoint)


PROMPTS = [[(7 * i * i + 3 * i) % 101 for i in range(n)] for n in (40, 57)]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family, devices, tmp_path_factory):
    folder, reference = written_by_transformers(family, tmp_path_factory.getbasetemp())
    engine, params = load(folder, devices)
    attend = attend_prompt(64, head_dim=16, **engine._attention)
    prefill = jax.jit(lambda *args: forward.prefill(engine._model, *args, attend)[0])
    answers = greedy(engine, params, PROMPTS, 32)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].numpy()
        logits_V = np.asarray(prefill(params, *engine.pad(prompt)))
        print(family, devices, np.abs(logits_V - expected[0]).max(), np.abs(expected).max(), len(set(answer)))
        np.testing.assert_allclose(logits_V, expected[0], atol=1e-4)
        assert expected.argmax(-1).tolist() == answer
        assert len(set(answer)) > 5
