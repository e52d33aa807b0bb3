"""Mistral's own format: params.json, consolidated.safetensors and tekken.json, as mistral-inference reads them.

Its fields and names are those of a Hugging Face folder under other names; its q and k are for a rope that turns
neighbours. https://github.com/mistralai/mistral-inference
"""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import RefusedError
from ..models.fields import Fields

PARAMS, WEIGHTS = "params.json", "consolidated"

RENAMED = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "head_dim": "head_dim", "vocab_size": "vocab_size", "rope_theta": "rope_theta",
}  # fmt: skip
"""Fields of params.json that every model has, and what a config.json calls them."""

HARMLESS = {"model_type", "use_biases", "causal", "max_batch_size", "vision_encoder", "multimodal"}
"""Fields that change no answer to a text: of a model that sees images the text model is taken."""

MODULES = {
    "tok_embeddings": "embed_tokens", "output": "lm_head", "norm": "norm", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}  # fmt: skip
"""Of a layer without its number."""
EXPERTS = "feed_forward.experts."

OF_IMAGES = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
"""How names begin that the text model has no use for."""


def of_params(params: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a `config.json` that say the same.

    Raises RefusedError for a field that is missing, and for one that could change answers and is not read.
    """
    fields = Fields(params, where)
    fields.only("use_biases", False)
    fields.only("causal", True)
    if params.get("quantization"):
        raise fields.refused("has quantization, which is not read; take the folder with a config.json")
    config = {ours: fields[theirs] for theirs, ours in RENAMED.items()}
    config["max_position_embeddings"] = fields.get("max_position_embeddings") or fields.get("max_seq_len")
    if config["max_position_embeddings"] is None:
        raise fields.refused("has neither max_position_embeddings nor max_seq_len; add the one it was trained with")
    config |= {"model_type": "mistral", "hidden_act": "silu", "sliding_window": fields.get("sliding_window")}
    config["tie_word_embeddings"] = fields.get("tied_embeddings", False)
    if (moe := fields.get("moe")) is not None:
        of_experts = fields.part("moe", {})
        config |= {
            "model_type": "mixtral", "num_local_experts": of_experts["num_experts"],
            "num_experts_per_tok": of_experts["num_experts_per_tok"],
        }  # fmt: skip
        _check_unread(fields, {name: moe[name] for name in moe if name not in ("num_experts", "num_experts_per_tok")})
    if fields.get("yarn") is not None:
        config["rope_scaling"] = _yarn(fields.part("yarn", {"apply_scale": True}))
    read = {*RENAMED, "max_position_embeddings", "max_seq_len", "sliding_window", "tied_embeddings", "moe", "yarn"}
    _check_unread(fields, {name: value for name, value in params.items() if name not in read | HARMLESS})
    return config


def _yarn(yarn: Fields) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn", "factor": yarn["factor"], "beta_fast": yarn["beta"], "beta_slow": yarn["alpha"],
        "original_max_position_embeddings": yarn["original_max_position_embeddings"],
    }  # fmt: skip
    return scaling if yarn["apply_scale"] else scaling | {"attention_factor": 1.0}


def _check_unread(fields: Fields, unread: Mapping[str, Any]) -> None:
    if told := sorted(name for name, value in unread.items() if value is not None):
        raise fields.refused(f"has {', '.join(told)}, which is not read; take the folder with a config.json")


def own_name(name: str) -> str | None:
    """What a Hugging Face folder calls a tensor, the leading `model.` left out; None: the text model has no use for it.
    A name that is not known stays."""
    if name.startswith(OF_IMAGES):
        return None
    matched = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(\w+)", name)
    if matched is None:
        return name
    layer, module, kind = matched[1] or "", matched[2], matched[3]
    if module.startswith(EXPERTS):
        return f"{layer}block_sparse_moe.experts.{module.removeprefix(EXPERTS)}.{kind}"
    return f"{layer}{MODULES[module]}.{kind}" if module in MODULES else name


def folder_error(folder: str) -> RefusedError:
    """What to tell of a params.json without weights."""
    return RefusedError(f"{folder} has a {PARAMS} and no {WEIGHTS}*.safetensors; fetch the model anew")
