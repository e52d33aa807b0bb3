"""The architectures of GGUF files, as their converter (llama.cpp's convert_hf_to_gguf.py) writes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODULES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {**LAYER_MODULES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GATE = {**LAYER_MODULES, "ffn_gate_inp": "block_sparse_moe.gate"}
EXPERT_STACKS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
"""A layer's experts in one tensor, the expert its first axis; a folder has `block_sparse_moe.experts.0.w1`, ..."""
_SANDWICH = {
    **LAYER_MODULES,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Get = Callable[..., Any]
"""(key, default): a field of the file, without the architecture's name before it"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one is told in the terms of a Hugging Face checkpoint."""

    model_type: str
    layer_modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    pairs: bool = False
    """q and k are stored for a rope that turns neighbours (2i, 2i+1) instead of halves (i, i + H/2)"""
    norms_from_zero: bool = False
    """norm weights are stored with one added"""
    fields: Callable[[Get], dict[str, Any]] = lambda get: {}
    """what else stands in the `config.json`"""


def _silu(get: Get) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _mixtral(get: Get) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
    }


def _gemma(get: Get) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _phi3(get: Get) -> dict[str, Any]:
    window = get("attention.sliding_window", 0)
    return {"hidden_act": "silu", "sliding_window": window or None}


def _gemma2(get: Get) -> dict[str, Any]:
    return {
        **_gemma(get),
        "sliding_window": get("attention.sliding_window", 4096),
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(get, layers_of_27b=46),
    }


def _gemma3(get: Get) -> dict[str, Any]:
    return {
        **_gemma(get),
        "sliding_window": get("attention.sliding_window"),
        "sliding_window_pattern": get("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": get("final_logit_softcapping", None),
        "query_pre_attn_scalar": _query_scale(get, layers_of_27b=62),
    }


def _query_scale(get: Get, layers_of_27b: int) -> int:
    """Files do not tell it. llama.cpp knows the 27B models, which scale otherwise, by their number of layers."""
    if get("block_count") == layers_of_27b:
        return get("embedding_length") // get("attention.head_count")
    return get("attention.key_length")


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", pairs=True, fields=_silu),
    "qwen2": Architecture(model_type="qwen2", fields=_silu),
    "qwen3": Architecture(model_type="qwen3", fields=_silu),
    "phi3": Architecture(model_type="phi3", layer_modules=_FUSED, fields=_phi3),
    "gemma": Architecture(model_type="gemma", norms_from_zero=True, fields=_gemma),
    "gemma2": Architecture(model_type="gemma2", layer_modules=_SANDWICH, norms_from_zero=True, fields=_gemma2),
    "gemma3": Architecture(model_type="gemma3_text", layer_modules=_SANDWICH, norms_from_zero=True, fields=_gemma3),
}
"""By `general.architecture`. docs/models.md lists them."""

WITH_EXPERTS = {"llama": Architecture(model_type="mixtral", layer_modules=_GATE, pairs=True, fields=_mixtral)}
"""What an architecture is when it has an `expert_count`."""
