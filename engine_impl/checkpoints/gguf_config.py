"""The fields of a GGUF file as those of a `config.json`, which the families read. Rules as in llama.cpp's loader."""

import math
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from ..errors import RefusedError
from ..models import registry
from ..models.decoder import ModelConfig
from ..models.transformer import TransformerConfig
from .gguf_architectures import (
    ARCHITECTURES,
    WINDOW,
    WINDOW_PATTERN,
    WITH_EXPERTS,
    WITH_WINDOWS,
    Architecture,
    Get,
)
from .gguf_parts import GGUFParts

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3.1 and later: divisors of the rope's frequencies."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Phi-3: LongRoPE's lists."""
MISSING = {"deepseek2": "deepseek_v3"}
"""Architectures that are asked for -> the model type that says why they are missing."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

KEYS = {
    key.removeprefix("{arch}.")
    for section in vars(gguf.Keys).values()
    if isinstance(section, type)
    for key in vars(section).values()
    if isinstance(key, str) and key.startswith("{arch}.")
}
"""All fields of architectures that the `gguf` package knows."""

_NOTHING = (0, False)
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_norm": (False, True),  # an architecture with experts has its own rule, as in llama.cpp
    **dict.fromkeys(("logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale"), (0, 1)),
    "rope.scaling.attn_factor": (0, 1),
}
"""Values of fields that ask for what is done anyway; of those that are not here 0 and False."""

DOES_NOTHING = {
    "vocab_size",  # the embedding tells
    "tensor_data_layout",
    "pooling_type",
    "use_parallel_residual",  # StableLM's tensors tell
    "expert_feed_forward_length",  # Mixtral's tensors tell
    "attention.layer_norm_epsilon",  # of models whose norms are RMS norms, and the other way round
    "attention.layer_norm_rms_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # of ropes that are not YaRN's, likewise the next two
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
"""Fields that change no answer of an architecture that does not read them."""


class GGUFFields:
    """A file's fields."""

    def __init__(self, file: GGUFParts, where: str) -> None:
        """`where` opens every message: the file's path."""
        self.file, self.where = file, where
        self._asked_for: set[str] = set()

    def __call__(self, key: str, *default: Any) -> Any:
        """A field; the default when it is missing. Raises RefusedError when there is neither."""
        self._asked_for.add(key)
        if key in self.file.fields:
            return self.file.fields[key]
        if default:
            return default[0]
        raise RefusedError(f"{self.where!r} lacks the field {key!r}; convert the model anew")

    def architecture(self) -> Architecture:
        """Raises RefusedError for one that is not there."""
        name = self("general.architecture")
        if name not in ARCHITECTURES:
            why = f", which is not there: {registry.NOT_THERE[MISSING[name]]}" if name in MISSING else ""
            raise RefusedError(
                f"model file {self.where!r} is of the family {name!r}{why}; the families there are: "
                f"{', '.join(ARCHITECTURES)}"
            )
        if name in WITH_WINDOWS and self(f"{name}.{WINDOW}", 0):
            return WITH_WINDOWS[name]
        if not self(f"{name}.expert_count", 0):
            return ARCHITECTURES[name]
        if name not in WITH_EXPERTS:
            raise RefusedError(f"{self.where!r} is a {name} with experts; those there are: {', '.join(WITH_EXPERTS)}")
        return WITH_EXPERTS[name]

    def of_architecture(self, key: str, *default: Any) -> Any:
        """A field whose key begins with the architecture's name. One value for each layer has to be one for all, but
        for which of them have a window."""
        value = self(f"{self('general.architecture')}.{key}", *default)
        if key == WINDOW_PATTERN:
            return value
        if isinstance(value := _of_all(value), list):
            raise RefusedError(f"{self.where!r} has layers that differ in {key}: {value}; that is not there yet")
        return value

    def check_unread(self) -> None:
        """Raises RefusedError for a field that could change answers and that nobody has asked for."""
        name = self("general.architecture")
        unread = {key for key in KEYS - DOES_NOTHING if f"{name}.{key}" not in self._asked_for}
        for key in sorted(key for key in unread if f"{name}.{key}" in self.file.fields):
            value = _of_all(self.file.fields[f"{name}.{key}"])
            if value not in _CHANGES_NOTHING.get(key, _NOTHING):
                raise RefusedError(f"{self.where!r} has {key}={value}, which is not read for a {name}; convert it anew")


def _of_all(value: Any) -> Any:
    """The one value of a list of equal ones; whatever else there is, as it is."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def read_gguf_config(file: GGUFParts, where: str) -> ModelConfig:
    """The family's config. Raises RefusedError for what the family cannot do, as for a `config.json`."""
    fields = GGUFFields(file, where)
    architecture, get = fields.architecture(), fields.of_architecture
    if EMBEDDING not in file.tensors:
        raise RefusedError(f"{where!r} has no token embedding; convert the model anew")
    heads, model_dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", model_dim // heads)
    if (value_dim := get("attention.value_length", head_dim)) != head_dim:
        raise RefusedError(
            f"{where!r} has heads of {head_dim} for keys and {value_dim} for values; that is not there yet"
        )
    config = {
        "model_type": architecture.model_type,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_size": model_dim,
        "intermediate_size": get("feed_forward_length"),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "max_position_embeddings": get("context_length"),
        **_eps(architecture, get),
        "tie_word_embeddings": HEAD not in file.tensors,
        "rope_parameters": _rope(fields, head_dim),
        **architecture.fields(get, file.tensors),
    }
    if architecture.two_ropes:
        rope = config["rope_parameters"]
        theta = get("rope.freq_base_swa", architecture.local_theta or rope["rope_theta"])
        local = {"rope_type": "default", "rope_theta": theta}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    fields.check_unread()
    read = registry.read_config(config, where)
    return _with_rope_factors(read, file, where)


def _eps(architecture: Architecture, get: Get) -> dict[str, Any]:
    if architecture.layer_norms:
        return {"layer_norm_eps": get("attention.layer_norm_epsilon")}
    return {"rms_norm_eps": get("attention.layer_norm_rms_epsilon")}


def _rope(fields: GGUFFields, head_dim: int) -> dict[str, Any]:
    """A factor without a type is linear, and `rope.scale_linear` is its older name."""
    get, file = fields.of_architecture, fields.file
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0)) or 1
    kind = get("rope.scaling.type", "linear")
    width = get("rope.dimension_count", head_dim)
    if width != head_dim and fields.architecture().pairs:
        raise RefusedError(f"{fields.where!r} turns only a part of each head, which is not there yet")
    rope = {
        "rope_type": "default",
        "rope_theta": get("rope.freq_base", 10000.0),  # absent means the first Llama's
        "partial_rotary_factor": width / head_dim,
    }
    if LONG_FACTORS in file.tensors:
        lists = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
        return (
            rope
            | {name: dequantised(file, stored, fields.where).tolist() for name, stored in lists.items()}
            | {
                "rope_type": "longrope",
                "attention_factor": get("rope.scaling.attn_factor", 1.0),
                "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            }
        )
    if kind == "none" or (kind == "linear" and factor == 1):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        usual = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "attention_factor": usual * get("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": fields.architecture().truncates_yarn,
        }
    raise RefusedError(f"{fields.where!r} scales its rope by {kind!r}; those there are: none, linear, yarn")


def _with_rope_factors(config: ModelConfig, file: GGUFParts, where: str) -> ModelConfig:
    if ROPE_FACTORS not in file.tensors or not isinstance(config, TransformerConfig):
        return config
    if config.rope_factors is not None:
        raise RefusedError(f"{where!r} scales its rope twice, by {ROPE_FACTORS} and its fields; convert the model anew")
    return replace(config, rope_factors=tuple(dequantised(file, ROPE_FACTORS, where).tolist()))


def dequantised(file: GGUFParts, stored_name: str, where: str, index: int | None = None) -> np.ndarray:
    """One tensor, or one entry along its first axis, f32. Raises RefusedError for a kind that cannot be dequantised."""
    try:
        return file.tensor(stored_name, index)
    except ValueError as error:
        raise RefusedError(f"{where!r}: {error}; take another quantisation of the model") from error
