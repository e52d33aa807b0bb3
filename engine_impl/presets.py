"""Shapes of well-known models, for planning and benchmarks without their weights.

Source of each: the `config.json` that its authors publish on the Hugging Face hub under the id given.
"""

from .errors import RefusedError
from .models.decoder import ModelConfig
from .models.llama import LlamaConfig, llama3_rope_factors


def _llama(layers: int, heads: int, kv_heads: int, model_dim: int, ffn_dim: int, **rest) -> LlamaConfig:
    defaults = {
        "head_dim": model_dim // heads, "vocab_size": 128256, "context_length": 131072, "tied_embeddings": False,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return LlamaConfig(
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, model_dim=model_dim, ffn_dim=ffn_dim,
        **(defaults | rest),
    )  # fmt: skip


_LLAMA_2 = {"vocab_size": 32000, "context_length": 4096, "rope_theta": 10000.0}
_LLAMA_3_1 = {"rope_factors": llama3_rope_factors(128, 500000.0, factor=8.0)}
_LLAMA_3_2_1B = {"rope_factors": llama3_rope_factors(64, 500000.0, factor=32.0), "tied_embeddings": True}
_LLAMA_3_2_3B = {"rope_factors": llama3_rope_factors(128, 500000.0, factor=32.0), "tied_embeddings": True}

PRESETS = {
    "llama-2-7b": _llama(32, 32, 32, 4096, 11008, **_LLAMA_2),  # meta-llama/Llama-2-7b-hf
    "llama-2-13b": _llama(40, 40, 40, 5120, 13824, **_LLAMA_2),  # meta-llama/Llama-2-13b-hf
    "llama-2-70b": _llama(80, 64, 8, 8192, 28672, **_LLAMA_2),  # meta-llama/Llama-2-70b-hf
    "llama-3.1-8b": _llama(32, 32, 8, 4096, 14336, **_LLAMA_3_1),  # meta-llama/Llama-3.1-8B
    "llama-3.1-70b": _llama(80, 64, 8, 8192, 28672, **_LLAMA_3_1),  # meta-llama/Llama-3.1-70B
    "llama-3.2-1b": _llama(16, 32, 8, 2048, 8192, **_LLAMA_3_2_1B),  # meta-llama/Llama-3.2-1B
    "llama-3.2-3b": _llama(28, 24, 8, 3072, 8192, **_LLAMA_3_2_3B),  # meta-llama/Llama-3.2-3B
    "smollm2-135m": _llama(
        30, 9, 3, 576, 1536, vocab_size=49152, context_length=8192, rope_theta=100000.0, tied_embeddings=True
    ),  # HuggingFaceTB/SmolLM2-135M-Instruct, the embedded model
}


def preset(name: str) -> ModelConfig:
    """Raises RefusedError for an unknown name, listing those there are."""
    if name not in PRESETS:
        raise RefusedError(f"model preset {name!r} is not there; those there are: {', '.join(PRESETS)}")
    return PRESETS[name]
