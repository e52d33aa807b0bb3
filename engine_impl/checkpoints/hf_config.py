"""A model's shape from a Hugging Face `config.json`, in the form of today and of before transformers 5."""

import json
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from ..models.llama import LlamaConfig, llama3_rope_factors


def read_hf_config(path: Path) -> LlamaConfig:
    """The config of a Llama.

    Args:
        path: a `config.json`, or the folder that holds it.

    Raises RefusedError when there is none, or when it asks for what is not there: another family, biases, another rope.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise RefusedError(
            f"{str(path)!r} cannot be read ({error.strerror}); give a config.json or its folder"
        ) from error
    except ValueError as error:
        raise RefusedError(f"{str(path)!r} is not JSON ({error}); fetch it anew") from error
    family = fields.get("model_type")
    if family != "llama":
        raise RefusedError(f"{str(path)!r} is of the family {family!r}; the families there are: llama")
    if fields.get("attention_bias") or fields.get("mlp_bias"):
        raise RefusedError(f"{str(path)!r} has biases, which the llama family here has not")
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise RefusedError(f"{str(path)!r} lacks {', '.join(missing)}; fetch it anew")
    rope = _rope(fields, path)
    heads, model_dim = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields.get("head_dim") or model_dim // heads
    return LlamaConfig(
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        tied_embeddings=fields.get("tie_word_embeddings", False),
        model_dim=model_dim,
        ffn_dim=fields["intermediate_size"],
        rope_theta=rope["rope_theta"],
        rms_norm_eps=fields["rms_norm_eps"],
        rope_factors=_rope_factors(rope, head_dim, path),
    )


_NEEDED = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


def _rope(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling`. Neither is an error: no guess."""
    if parameters := fields.get("rope_parameters"):
        return parameters
    if "rope_theta" not in fields:
        raise RefusedError(f"{str(path)!r} has neither rope_parameters nor rope_theta; add the one it was trained with")
    return {"rope_theta": fields["rope_theta"], **(fields.get("rope_scaling") or {})}


def _rope_factors(rope: dict[str, Any], head_dim: int, path: Path) -> tuple[float, ...] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise RefusedError(f"{str(path)!r} scales its rope by {kind!r}; those there are: default, llama3")
    return llama3_rope_factors(
        head_dim,
        rope["rope_theta"],
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        trained_length=rope["original_max_position_embeddings"],
    )
