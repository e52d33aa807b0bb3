"""What a config.json says of how the weights beside it were quantised."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RefusedError
from ..models.fields import Fields
from . import prequantized
from .contract import Quantization
from .prequantized import PER_WORD, Format

REMEDY = "take a copy of the model that is not quantised, and give --quantize-weights int8 or int4"


def read_format(fields: Mapping[str, Any], where: str) -> Format | None:
    """How quantised matrices lie in the files of a config.json with these fields; None if there are none.

    Raises RefusedError for what cannot be read, naming it.
    """
    described = fields.get("quantization_config") or fields.get("compression_config")
    if not described:
        return None
    said = _Said(described, where)
    method = said.get("quant_method", "compressed-tensors" if "config_groups" in described else None)
    if method not in METHODS:
        raise RefusedError(
            f"{where!r} is quantised by {method!r}; the methods that can be read: {', '.join(METHODS)}; {REMEDY}"
        )
    return METHODS[method](said)


class _Said(Fields):
    """A quantization_config."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields, where)
        self.where = where

    def refused(self, what: str) -> RefusedError:
        return RefusedError(f"{self.where!r} {what} (quantization_config); {REMEDY}")

    def group(self, value: Any) -> int | None:
        """Inputs that share a scale; None: all."""
        if not isinstance(value, int) or value == 0 or value < -1:
            raise self.refused(f"asks for group_size={value!r}")
        return None if value == -1 else value


def _awq(said: _Said) -> Format:
    said.only("bits", 4)
    said.only("version", "gemm", "GEMM")
    said.only("format", "gemm")
    said.only("zero_point", True)
    floats = tuple(f".*{re.escape(part)}.*" for part in said.get("modules_to_not_convert", []))
    return Format(
        where=said.where,
        quantization=Quantization("int4", said.group(said["group_size"]), floats=floats),
        marker="qweight",
        codes="qweight",
        shape_of=lambda rows, words: (words * PER_WORD, rows),
        parts_of=lambda O, I, Q: {"qweight": (I, O // PER_WORD), "qzeros": (Q, O // PER_WORD), "scales": (Q, O)},
        read=prequantized.read_awq,
    )


def _gptq(said: _Said) -> Format:
    said.only("bits", 4)
    version = "checkpoint_format" if said.get("checkpoint_format") else "format"  # older and newer tools
    said.only(version, "gptq", "gptq_v2")
    said.only("is_marlin_format", False)
    rules = said.get("dynamic", {})
    if any(not rule.startswith("-:") for rule in rules):
        raise said.refused("quantises some modules otherwise than the rest (dynamic)")
    group = said.group(said["group_size"])
    is_v2 = said.get(version) == "gptq_v2"
    return Format(
        where=said.where,
        quantization=Quantization(
            "int4",
            group,
            act_order=said.get("desc_act", False) and group is not None,
            floats=tuple(f"(?:{rule.removeprefix('-:')}).*" for rule in rules),
        ),
        marker="qweight",
        codes="qweight",
        shape_of=lambda words, columns: (columns, words * PER_WORD),
        parts_of=lambda O, I, Q: {"qweight": (I // PER_WORD, O), "qzeros": (Q, O // PER_WORD), "scales": (Q, O)},
        group_index="g_idx",
        read=prequantized.read_gptq_v2 if is_v2 else prequantized.read_gptq,
    )


def _compressed_tensors(said: _Said) -> Format:
    said.only("format", "int-quantized", "naive-quantized", "pack-quantized")
    if said.get("kv_cache_scheme"):
        raise said.refused("asks for kv_cache_scheme")
    if said.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise said.refused("asks for sparsity_config")
    groups = list(said["config_groups"].values())
    if any(group.get("weights") != groups[0].get("weights") for group in groups):
        raise said.refused("quantises some modules otherwise than the rest (config_groups)")
    for group in groups:
        if (group.get("input_activations") or {}).get("dynamic", True) is not True:
            raise said.refused("asks for input_activations with fixed scales")
    weights = _Said(groups[0].get("weights") or {}, said.where)
    weights.only("type", "int")
    floats = tuple(_pattern(name) for name in said.get("ignore", []))
    return (_packed if said["format"] == "pack-quantized" else _int8)(weights, floats)


def _packed(weights: _Said, floats: tuple[str, ...]) -> Format:
    weights.only("num_bits", 4)
    weights.only("strategy", "group", "channel")
    group = weights.group(weights["group_size"]) if weights["strategy"] == "group" else None
    symmetric = weights.get("symmetric", True)

    def parts_of(O: int, I: int, Q: int) -> dict[str, tuple[int, ...]]:
        zeros = {} if symmetric else {"weight_zero_point": (O // PER_WORD, Q)}
        return {"weight_packed": (O, I // PER_WORD), "weight_scale": (O, Q), "weight_shape": (2,), **zeros}

    return Format(
        where=weights.where,
        quantization=Quantization(
            "int4", group, act_order=weights.get("actorder") == "group" and group is not None, floats=floats
        ),
        marker="weight_packed",
        codes="weight_packed",
        shape_of=lambda rows, words: (rows, words * PER_WORD),
        parts_of=parts_of,
        group_index="weight_g_idx",
        read=prequantized.read_packed if symmetric else prequantized.read_packed_with_zeros,
    )


def _int8(weights: _Said, floats: tuple[str, ...]) -> Format:
    weights.only("num_bits", 8)
    weights.only("strategy", "channel")
    weights.only("symmetric", True)
    return Format(
        where=weights.where,
        quantization=Quantization("int8", floats=floats),
        marker="weight_scale",
        codes="weight",
        shape_of=lambda rows, columns: (rows, columns),
        parts_of=lambda O, I, Q: {"weight": (O, I), "weight_scale": (O, 1)},
        read=prequantized.read_int8,
    )


def _pattern(ignored: str) -> str:
    """compressed-tensors: a module's name, or `re:` and what it begins with."""
    return f"(?:{ignored.removeprefix('re:')}).*" if ignored.startswith("re:") else re.escape(ignored)


METHODS: dict[str, Callable[[_Said], Format]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
