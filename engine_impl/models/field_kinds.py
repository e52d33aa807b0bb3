"""Which values the fields of a `config.json` may have at all, whatever the family: a config is a stranger's file.

A field that is left out or null is nobody's error here. What a family cannot do it refuses itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RefusedError

SHOWN = 80
"""The longest value in a message (characters)."""

Kind = tuple[str, Callable[[Any], bool]]
"""What is allowed, in words that fit behind "must be", and whether a value is."""


def count(high: int, low: int = 1) -> Kind:
    return f"a whole number from {low} to {high}", lambda value: is_whole(value) and low <= value <= high


def number(high: float = math.inf, *, low: float = 0.0) -> Kind:
    """Above `low`, which is left out."""
    text = f"a number above {low:g}" + (f", at most {high:g}" if high < math.inf else "")
    return text, lambda value: is_number(value) and low < value <= high


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_whole(value) and abs(value) < 2**63) or (isinstance(value, float) and math.isfinite(value))


def of_type(kind: type, text: str) -> Kind:
    return text, lambda value: isinstance(value, kind)


def is_id(value: Any) -> bool:
    return is_whole(value) and -1 <= value < 2**31


FLAG = of_type(bool, "true or false")
TEXT = of_type(str, "a text")
OBJECT = of_type(dict, "an object")
TEXTS: Kind = (
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
)
IDS: Kind = (
    "a token id or a list of them",
    lambda value: is_id(value) or (isinstance(value, list) and all(map(is_id, value))),
)
NUMBERS: Kind = (
    "a list of numbers",
    lambda value: isinstance(value, list) and all(is_number(one) and one > 0 for one in value),
)

KINDS: Mapping[str, Kind] = {
    "vocab_size": count(1 << 24),
    "hidden_size": count(1 << 18),
    "intermediate_size": count(1 << 20),
    "moe_intermediate_size": count(1 << 20),
    "num_hidden_layers": count(2048),
    "num_attention_heads": count(1 << 14),
    "num_key_value_heads": count(1 << 14),
    "head_dim": count(1 << 13),
    "max_position_embeddings": count((1 << 31) - 1),
    "original_max_position_embeddings": count((1 << 31) - 1),
    "num_local_experts": count(4096),
    "num_experts": count(4096),
    "num_experts_per_tok": count(4096),
    "sliding_window": count((1 << 31) - 1),
    "sliding_window_pattern": count(2048),
    "max_window_layers": count(1 << 16, low=0),
    "rms_norm_eps": number(1.0),
    "layer_norm_eps": number(1.0),
    "rope_theta": number(),
    "rope_local_base_freq": number(),
    "partial_rotary_factor": number(),
    "query_pre_attn_scalar": number(),
    "attn_logit_softcapping": number(),
    "final_logit_softcapping": number(),
    "swiglu_alpha": number(),
    "swiglu_limit": number(),
    "tie_word_embeddings": FLAG,
    "use_sliding_window": FLAG,
    "model_type": TEXT,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "architectures": TEXTS,
    "layer_types": TEXTS,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "quantization_config": OBJECT,
    "eos_token_id": IDS,
    "bos_token_id": IDS,
    "pad_token_id": IDS,
}
"""Of a config and of the text_config within."""

ROPE_KINDS: Mapping[str, Kind] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": number(),
    "factor": number(1e6),
    "partial_rotary_factor": number(),
    "attention_factor": number(),
    "beta_fast": number(),
    "beta_slow": number(),
    "low_freq_factor": number(),
    "high_freq_factor": number(),
    "original_max_position_embeddings": count((1 << 31) - 1),
    "long_factor": NUMBERS,
    "short_factor": NUMBERS,
}
"""Of rope_scaling, rope_parameters, and what the latter holds for each kind of layer."""


def check_kinds(fields: Any, where: str) -> None:
    """Raises RefusedError: the file, the field, its value, and what it may be."""
    if not isinstance(fields, dict):
        raise RefusedError(f"{where!r} is no JSON object; fetch it anew")
    _check(fields, KINDS, where, "")
    _check_rope(fields, where, "")
    if isinstance(text := fields.get("text_config"), dict):
        _check(text, KINDS, where, "text_config.")
        _check_rope(text, where, "text_config.")


def _check_rope(fields: Mapping[str, Any], where: str, path: str) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name) or {}
        _check(rope, ROPE_KINDS, where, f"{path}{name}.")
        for layer_type, inner in rope.items():
            if isinstance(inner, dict):
                _check(inner, ROPE_KINDS, where, f"{path}{name}.{shown(layer_type)}.")


def _check(fields: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, path: str) -> None:
    for name, (text, holds) in kinds.items():
        value = fields.get(name)
        if value is not None and not holds(value):
            raise RefusedError(
                f"{where!r} has {path}{name}={shown(value)}, which must be {text}; mend it or fetch it anew"
            )


def shown(value: Any) -> str:
    """Short, on one line, with nothing in it that a terminal would obey."""
    text = f"{value:.3g}" if is_whole(value) and abs(value) > 2**63 else ascii(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
