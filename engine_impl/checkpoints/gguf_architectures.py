"""The architectures of GGUF files, as their converter (llama.cpp's convert_hf_to_gguf.py) writes them."""

from collections.abc import Callable, Container, Mapping
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
_STACKS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_QWEN3_GATE = {**LAYER_MODULES, "ffn_gate_inp": "mlp.gate"}
_QWEN3_STACKS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}
_GPT_OSS = {
    **LAYER_MODULES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
_POST_NORMS = {
    **LAYER_MODULES,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4 = {
    **LAYER_MODULES,
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_layernorm.norms.{}", "attn_k_norm": "self_attn.k_layernorm.norms.{}"}
WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
QUERY_BIAS, QUERY_NORM, FFN_NORM = "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.0.ffn_norm.weight"
_SANDWICH = {
    **LAYER_MODULES,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Get = Callable[..., Any]
"""(key, default): a field of the file, without the architecture's name before it"""
Tensors = Container[str]
"""The names of the file's tensors."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one is told in the terms of a Hugging Face checkpoint."""

    model_type: str
    layer_modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    layer_parameters: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer that are no module's weight or bias."""
    stacks: Mapping[str, str] = field(default_factory=dict)
    """Modules of which a layer has several, in one tensor whose first axis they are; {} is the number of each."""
    pairs: bool = False
    """q and k are stored for a rope that turns neighbours (2i, 2i+1), and a folder has them for one that turns halves
    (i, i + H/2)"""
    norms_from_zero: bool = False
    """norm weights are stored with one added"""
    truncates_yarn: bool = True
    """what a YaRN rope's `truncate` is; files do not tell"""
    layer_norms: bool = False
    """norms are layer norms"""
    two_ropes: bool = False
    """layers with a window have a rope of their own, which is not scaled"""
    local_theta: float | None = None
    """its theta where a file does not tell; None: that of the other layers"""
    fields: Callable[[Get, Tensors], dict[str, Any]]
    """what else stands in the `config.json`"""


def _silu(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_act": "silu"}


def _llama(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": QUERY_BIAS in tensors}


def _mixtral(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
    }


def _qwen3_moe(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "norm_topk_prob": True,  # files do not tell; so in llama.cpp, and in all that was published
    }


def _gpt_oss(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "intermediate_size": get("expert_feed_forward_length"),
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "sliding_window": get(WINDOW),
    }


def _smollm3(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {**_llama(get, tensors), "no_rope_layer_interval": 4}  # files do not tell; so in llama.cpp


def _granite(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        **_llama(get, tensors),
        "embedding_multiplier": get("embedding_scale", 1.0),
        "attention_multiplier": get("attention.scale"),
        "residual_multiplier": get("residual_scale", 1.0),
        "logits_scaling": get("logit_scale"),
        "position_embedding_type": "rope" if get("rope.scaling.finetuned", True) else "nope",
    }


def _glm4(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": QUERY_BIAS in tensors}


def _cohere(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_act": "silu", "logit_scale": get("logit_scale"), "use_qk_norm": QUERY_NORM in tensors}


def _cohere2(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "logit_scale": get("logit_scale"),
        "sliding_window": get(WINDOW),
        "sliding_window_pattern": 4,  # files do not tell; so in llama.cpp
    }


def _stablelm(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "use_qkv_bias": QUERY_BIAS in tensors,
        "qk_layernorm": QUERY_NORM in tensors,
        "use_parallel_residual": FFN_NORM not in tensors,  # as llama.cpp; the field of this name is not heard
    }


def _gemma(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh"}


def _phi3(get: Get, tensors: Tensors) -> dict[str, Any]:
    window = get(WINDOW, 0)
    return {"hidden_act": "silu", "sliding_window": window or None}


def _gemma2(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        **_gemma(get, tensors),
        "sliding_window": get(WINDOW, 4096),
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(get, layers_of_27b=46),
    }


def _gemma3(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {
        **_gemma(get, tensors),
        **_windows(get, every=6),
        "final_logit_softcapping": get("final_logit_softcapping", None),
        "query_pre_attn_scalar": _query_scale(get, layers_of_27b=62),
    }


def _olmo3(get: Get, tensors: Tensors) -> dict[str, Any]:
    return {**_silu(get, tensors), **_windows(get, every=4)}


def _windows(get: Get, *, every: int) -> dict[str, Any]:
    """Files tell by number which layers see all, or for each layer whether it has a window, or not, as in llama.cpp:
    then the last of so many sees all."""
    pattern = get(WINDOW_PATTERN, every)
    if not isinstance(pattern, list):
        pattern = [bool((i + 1) % pattern) for i in range(get("block_count"))]
    kinds = ["sliding_attention" if has_window else "full_attention" for has_window in pattern]
    return {"sliding_window": get(WINDOW), "layer_types": kinds}


def _query_scale(get: Get, layers_of_27b: int) -> int:
    """Files do not tell it. llama.cpp knows the 27B models, which scale otherwise, by their number of layers."""
    if get("block_count") == layers_of_27b:
        return get("embedding_length") // get("attention.head_count")
    return get("attention.key_length")


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", pairs=True, fields=_llama),
    "qwen2": Architecture(model_type="qwen2", fields=_silu),
    "qwen3": Architecture(model_type="qwen3", fields=_silu),
    "smollm3": Architecture(model_type="smollm3", pairs=True, fields=_smollm3),
    "olmo2": Architecture(model_type="olmo2", layer_modules=_POST_NORMS, fields=_silu),
    "granite": Architecture(model_type="granite", pairs=True, fields=_granite),
    "glm4": Architecture(model_type="glm4", layer_modules=_GLM4, fields=_glm4),
    "command-r": Architecture(model_type="cohere", layer_norms=True, fields=_cohere),
    "cohere2": Architecture(model_type="cohere2", layer_norms=True, fields=_cohere2),
    "stablelm": Architecture(model_type="stablelm", stacks=_HEAD_NORMS, layer_norms=True, fields=_stablelm),
    "phi3": Architecture(model_type="phi3", layer_modules=_FUSED, fields=_phi3),
    "gemma": Architecture(model_type="gemma", norms_from_zero=True, fields=_gemma),
    "gemma2": Architecture(model_type="gemma2", layer_modules=_SANDWICH, norms_from_zero=True, fields=_gemma2),
    "gemma3": Architecture(
        model_type="gemma3_text",
        layer_modules=_SANDWICH,
        norms_from_zero=True,
        two_ropes=True,
        local_theta=10000.0,
        fields=_gemma3,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        layer_modules=_GPT_OSS,
        truncates_yarn=False,
        layer_parameters={"attn_sinks.weight": "self_attn.sinks"},
        stacks=_QWEN3_STACKS,
        fields=_gpt_oss,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", layer_modules=_QWEN3_GATE, stacks=_QWEN3_STACKS, fields=_qwen3_moe
    ),
}
"""By `general.architecture`. docs/models.md lists them."""

WITH_EXPERTS = {
    "llama": Architecture(model_type="mixtral", layer_modules=_GATE, stacks=_STACKS, pairs=True, fields=_mixtral),
    "qwen3moe": ARCHITECTURES["qwen3moe"],
    "gpt-oss": ARCHITECTURES["gpt-oss"],
}
"""What an architecture is when it has an `expert_count`."""

WITH_WINDOWS = {
    "olmo2": Architecture(model_type="olmo3", layer_modules=_POST_NORMS, two_ropes=True, fields=_olmo3),
}
"""What an architecture is when it has a window."""
