"""What a config.json says of how the weights beside it were quantised."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import RefusedError
from . import prequantized
from .contract import Quantization
from .mixed import Mixed
from .mxfp4 import MXFP4
from .prequantized import PER_WORD, Format
from .quantization_fields import REMEDY, Said
from .widened import NF4, Float8

AnyFormat = Format | Float8 | NF4 | MXFP4 | Mixed
OneOfMany = Format | Float8 | None
"""What a part of a mixed checkpoint is in; None: it was left as it is."""
LINEAR = "Linear"
"""compressed-tensors: all linear modules that no name or pattern tells of."""


def read_format(fields: Mapping[str, Any], where: str) -> AnyFormat | None:
    """How quantised matrices lie in the files of a config.json with these fields; None if there are none.

    Raises RefusedError for what cannot be read, naming it.
    """
    described = fields.get("quantization_config") or fields.get("compression_config")
    if not described:
        return None
    said = Said(described, where)
    method = said.get("quant_method", "compressed-tensors" if "config_groups" in described else None)
    if method not in METHODS:
        raise RefusedError(
            f"{where!r} is quantised by {method!r}; the methods that can be read: {', '.join(METHODS)}; {REMEDY}"
        )
    return METHODS[method](said)


def _awq(said: Said) -> Format:
    said.only("bits", 4)
    said.only("version", "gemm", "GEMM")
    said.only("format", "gemm")
    said.only("zero_point", True)
    floats = tuple(f".*{re.escape(part)}.*" for part in said.get("modules_to_not_convert", []))
    return Format(
        where=said.where,
        stored=Quantization("int4", said.group(said["group_size"]), floats=floats),
        marker="qweight",
        codes="qweight",
        shape_of=lambda rows, words: (words * PER_WORD, rows),
        parts_of=lambda O, I, Q: {"qweight": (I, O // PER_WORD), "qzeros": (Q, O // PER_WORD), "scales": (Q, O)},
        read=prequantized.read_awq,
    )


def _gptq(said: Said) -> Format | Mixed:
    version = "checkpoint_format" if said.get("checkpoint_format") else "format"  # older and newer tools
    said.only(version, "gptq", "gptq_v2")
    said.only("is_marlin_format", False)
    first_zero = 0 if said.get(version) == "gptq_v2" else 1
    rules = said.get("dynamic", {})
    others = {rule: of_rule for rule, of_rule in rules.items() if not rule.startswith("-:")}
    left = [_begins(rule.removeprefix("-:")) for rule in rules if rule not in others]
    if not others:
        return _gptq_format(said, first_zero, tuple(left))
    formats = {
        _begins(rule.removeprefix("-:").removeprefix("+:")): None
        if rule not in others
        else _gptq_format(said.changed(of_rule), first_zero)
        for rule, of_rule in rules.items()
    }
    return Mixed(where=said.where, formats=formats | {".*": _gptq_format(said, first_zero)})


def _gptq_format(said: Said, first_zero: int, floats: tuple[str, ...] = ()) -> Format:
    said.only("bits", 4, 8)
    bits, group = said["bits"], said.group(said["group_size"])
    per_word = 32 // bits
    return Format(
        where=said.where,
        stored=Quantization(
            "int4" if bits == 4 else "int8",
            group,
            act_order=said.get("desc_act", False) and group is not None,
            floats=floats,
        ),
        is_kept=bits == 4 or (group is None and said.get("sym", True)),  # else no scale of an output alone tells them
        marker="qweight",
        codes="qweight",
        shape_of=lambda words, columns: (columns, words * per_word),
        parts_of=lambda O, I, Q: {"qweight": (I // per_word, O), "qzeros": (Q, O // per_word), "scales": (Q, O)},
        group_index="g_idx",
        read=partial(
            prequantized.read_gptq,
            unpacked=prequantized.nibbles if bits == 4 else prequantized.bytes_of,
            first_zero=first_zero,
        ),
    )


def _fp8(said: Said) -> Float8:
    said.only("fmt", "e4m3")
    said.only("activation_scheme", "dynamic", "static")
    fixed = said.get("activation_scheme") == "static"
    if (block := said.get("weight_block_size")) is not None:
        return Float8(where=said.where, strategy="block", block=said.block(block), fixed_activations=fixed)
    return Float8(where=said.where, strategy="tensor", fixed_activations=fixed)


def _fbgemm_fp8(said: Said) -> Float8:
    return Float8(where=said.where, strategy="channel")


def _bitsandbytes(said: Said) -> NF4:
    said.only("load_in_8bit", False)
    said.only("load_in_4bit", True)
    said.only("bnb_4bit_quant_type", "nf4")
    said.only("bnb_4bit_quant_storage", "uint8")
    return NF4(where=said.where)


def _mxfp4(said: Said) -> MXFP4:
    return MXFP4(where=said.where)


def _compressed_tensors(said: Said) -> Format | Float8 | Mixed:
    if said.get("kv_cache_scheme"):
        raise said.refused("asks for kv_cache_scheme")
    if said.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise said.refused("asks for sparsity_config")
    groups = [
        Said({**group, "format": group.get("format") or said["format"]}, said.where)
        for group in said["config_groups"].values()
    ]
    floats = tuple(_pattern(name) for name in said.get("ignore", []))
    if all(group.get("weights") == groups[0].get("weights") for group in groups):
        fixed = any(map(_has_fixed_activations, groups))
        return _compressed_format(groups[0], fixed, floats)
    formats: dict[str, OneOfMany] = dict.fromkeys(floats)
    for group in groups:
        of_group = _compressed_format(group, _has_fixed_activations(group))
        formats |= {_pattern(target): of_group for target in group["targets"] if target != LINEAR}
    for group in groups:
        if LINEAR in group["targets"]:
            formats[".*"] = _compressed_format(group, _has_fixed_activations(group))
    return Mixed(where=said.where, formats=formats)


def _has_fixed_activations(group: Said) -> bool:
    return group.get("input_activations", {}).get("dynamic", True) is not True


def _compressed_format(group: Said, fixed_activations: bool, floats: tuple[str, ...] = ()) -> Format | Float8:
    group.only("format", "int-quantized", "naive-quantized", "pack-quantized", "float-quantized")
    weights = Said(group.get("weights", {}), group.where)
    if group["format"] == "float-quantized" or (
        group["format"] == "naive-quantized" and weights.get("type") == "float"
    ):
        return _float8(weights, fixed_activations)
    if fixed_activations:
        raise group.refused("asks for input_activations with fixed scales")
    weights.only("type", "int")
    return (_packed if group["format"] == "pack-quantized" else _int8)(weights, floats)


def _float8(weights: Said, fixed_activations: bool) -> Float8:
    weights.only("type", "float")
    weights.only("num_bits", 8)
    weights.only("strategy", "tensor", "channel", "block")
    weights.only("symmetric", True)
    strategy = weights["strategy"]
    block = weights.block(weights["block_structure"]) if strategy == "block" else (1, 1)
    return Float8(where=weights.where, strategy=strategy, block=block, fixed_activations=fixed_activations)


def _packed(weights: Said, floats: tuple[str, ...]) -> Format:
    weights.only("num_bits", 4)
    weights.only("strategy", "group", "channel")
    group = weights.group(weights["group_size"]) if weights["strategy"] == "group" else None
    symmetric = weights.get("symmetric", True)

    def parts_of(O: int, I: int, Q: int) -> dict[str, tuple[int, ...]]:
        zeros = {} if symmetric else {"weight_zero_point": (O // PER_WORD, Q)}
        return {"weight_packed": (O, I // PER_WORD), "weight_scale": (O, Q), "weight_shape": (2,), **zeros}

    return Format(
        where=weights.where,
        stored=Quantization(
            "int4", group, act_order=weights.get("actorder") == "group" and group is not None, floats=floats
        ),
        marker="weight_packed",
        codes="weight_packed",
        shape_of=lambda rows, words: (rows, words * PER_WORD),
        parts_of=parts_of,
        group_index="weight_g_idx",
        read=prequantized.read_packed if symmetric else prequantized.read_packed_with_zeros,
    )


def _int8(weights: Said, floats: tuple[str, ...]) -> Format:
    weights.only("num_bits", 8)
    weights.only("strategy", "channel")
    weights.only("symmetric", True)
    return Format(
        where=weights.where,
        stored=Quantization("int8", floats=floats),
        marker="weight_scale",
        codes="weight",
        shape_of=lambda rows, columns: (rows, columns),
        parts_of=lambda O, I, Q: {"weight": (O, I), "weight_scale": (O, 1)},
        read=prequantized.read_int8,
    )


def _pattern(name: str) -> str:
    """compressed-tensors: a module's name, or `re:` and what it begins with."""
    return _begins(name.removeprefix("re:")) if name.startswith("re:") else re.escape(name)


def _begins(pattern: str) -> str:
    return f"(?:{pattern}).*"


METHODS: dict[str, Callable[[Said], AnyFormat]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}
