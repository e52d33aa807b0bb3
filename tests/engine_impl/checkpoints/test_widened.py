"""fp8 and NF4 folders against values computed by hand: as floats, and as what lies in memory."""

import json
import logging
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.plan import quantization_of
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine

from .folders import CONFIG, random_tensors, write_folder

BLOCK = (20, 12)
"""It divides neither the outputs nor the inputs of most matrices."""


def of_float8(strategy, format="float-quantized", **weights):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}}
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"],
    }  # fmt: skip


FORMATS = {  # the quantization_config, what the scale is called, its shape for [O, I]
    "fp8, a tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", lambda O, I: ()),
    "fp8, blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        "weight_scale_inv", lambda O, I: (-(-O // BLOCK[0]), -(-I // BLOCK[1])),
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "weight_scale", lambda O, I: (O, 1)),
    "float-quantized, a tensor": (of_float8("tensor"), "weight_scale", lambda O, I: (1,)),
    "float-quantized, channels": (of_float8("channel"), "weight_scale", lambda O, I: (O, 1)),
    "naive-quantized": (of_float8("channel", "naive-quantized"), "weight_scale", lambda O, I: (O, 1)),
    "float-quantized, blocks": (
        of_float8("block", block_structure=list(BLOCK)),
        "weight_scale", lambda O, I: (-(-O // BLOCK[0]), -(-I // BLOCK[1])),
    ),
}  # fmt: skip


def float8_folder(kind, path, damage=lambda tensors: None):
    """(the folder, {parameter: its exact values, float64}). `kind` is a key of FORMATS, or what stands there."""
    described, scale_name, scale_shape = kind if isinstance(kind, tuple) else FORMATS[kind]
    rng, tensors, exact, block = np.random.default_rng(3), {}, {}, described.get("weight_block_size", BLOCK)
    for name, value in random_tensors().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        code, module = (value * 8).astype(ml_dtypes.float8_e4m3fn), name.removesuffix("weight")
        scale = rng.uniform(0.1, 0.2, scale_shape(*value.shape)).astype(np.float32)
        tensors |= {name: code, module + scale_name: scale}
        if described.get("activation_scheme") == "static":
            tensors[module + "input_scale"] = np.full(1, 0.5, np.float32)
        exact[name.removeprefix("model.")] = np.array(
            [
                [float(code[o, i]) * float(scale_of(scale, o, i, block)) for i in range(value.shape[1])]
                for o in range(value.shape[0])
            ]
        )
    damage(tensors)
    return write_folder(path, tensors=tensors, config=CONFIG | {"quantization_config": described}), exact


def scale_of(scale, o, i, block):
    if scale.size == 1:
        return scale.reshape(())
    return scale[o, 0] if scale.shape[1] == 1 else scale[o // block[0], i // block[1]]


@pytest.mark.parametrize("kind", FORMATS)
def test_float8_is_widened(kind, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        folder, exact = float8_folder(kind, tmp_path)
        checkpoint = SafetensorsCheckpoint(folder)
    assert "14 matrices of fp8, which are widened to floats, but by native kernels of CPUs" in caplog.text
    assert len(exact) == 14
    for name, values in exact.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, values, rtol=1e-6)
    assert checkpoint.quantization is None
    assert quantization_of(str(folder)) is None
    assert set(checkpoint.shapes()) == {name.removeprefix("model.") for name in random_tensors()}


def test_a_folder_of_float8_is_served(tmp_path):
    folder, exact = float8_folder("fp8, blocks", tmp_path)
    config = EngineConfig(model=str(folder), cache_length=128, slots=2, max_prefill_length=16, tensor_parallel=1)
    _, params = load_engine(config)
    for name, values in exact.items():
        _, layer, own = name.split(".", 2)
        np.testing.assert_allclose(params["layers"][int(layer)][own], values, rtol=1e-6)


UP = "model.layers.1.mlp.up_proj."
DAMAGES = {
    "another scale": (
        lambda t: t.update({UP + "weight_scale_inv": np.ones((48, 1), np.float32)}),
        r"weight_scale_inv to be \(3, 3\), but it is \(48, 1\)",
    ),
    "no codes": (lambda t: t.pop(UP + "weight"), r"needs a matrix layers\.1\.mlp\.up_proj\.weight beside"),
    "no scale": (lambda t: t.pop(UP + "weight_scale_inv"), r"up_proj\.weight in F8_E4M3"),
    "floats": (
        lambda t: t.update({UP + "weight": np.ones((48, 32), np.float32)}),
        r"up_proj\.weight to be float8_e4m3fn, but it is float32",
    ),
    "NaN": (
        lambda t: t[UP + "weight"].view(np.uint8).__setitem__((0, 0), 0x7F), r"NaN or infinite as float32: layers\.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_float8_is_told(damage, tmp_path):
    change, message = DAMAGES[damage]
    folder, _ = float8_folder("fp8, blocks", tmp_path, change)
    with pytest.raises(RefusedError, match=message):
        load_engine(EngineConfig(model=str(folder), cache_length=128, slots=2, tensor_parallel=1))


NF4_TABLE = np.array(
    [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
        0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ],
    np.float32,
)  # fmt: skip
BLOCKSIZE, NESTED = 64, 256


def nf4_folder(path, *, nested, damage=lambda tensors: None):
    """(the folder, {parameter: its values, float64}); a value after the other."""
    rng, tensors, exact = np.random.default_rng(5), {}, {}
    for name, value in random_tensors().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        count = value.size
        code = rng.integers(0, 16, count)
        blocks = -(-count // BLOCKSIZE)
        state = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": "bfloat16", "shape": list(value.shape)}
        parts: dict[str, Any] = {
            "weight": np.array([[16 * a + b] for a, b in zip(code[::2], code[1::2], strict=True)], np.uint8)
        }
        if nested:
            scale_code, table = rng.integers(0, 256, blocks), np.linspace(-1, 1, 256, dtype=np.float32)
            above = rng.uniform(0.05, 0.1, -(-blocks // NESTED)).astype(np.float32)
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.2}
            scale = [float(table[c]) * float(above[b // NESTED]) + 0.2 for b, c in enumerate(scale_code)]
            parts |= {
                "weight.absmax": scale_code.astype(np.uint8), "weight.nested_absmax": above,
                "weight.nested_quant_map": table,
            }  # fmt: skip
        else:
            parts["weight.absmax"] = rng.uniform(0.1, 0.3, blocks).astype(np.float32)
            scale = parts["weight.absmax"].astype(float)
        parts["weight.quant_map"] = NF4_TABLE
        parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors |= {name.removesuffix("weight") + part: array for part, array in parts.items()}
        values = [float(NF4_TABLE[c]) * scale[i // BLOCKSIZE] for i, c in enumerate(code)]
        exact[name.removeprefix("model.")] = np.array(values).reshape(value.shape)
    described = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    damage(tensors)
    return write_folder(path, tensors=tensors, config=CONFIG | {"quantization_config": described}), exact


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_widened(nested, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        folder, exact = nf4_folder(tmp_path, nested=nested)
        checkpoint = SafetensorsCheckpoint(folder)
    assert "14 matrices of NF4, which are widened to floats; --quantize-weights" in caplog.text
    for name, values in exact.items():
        np.testing.assert_allclose(checkpoint.tensor(name), values, rtol=1e-6, atol=1e-9)
    assert checkpoint.quantization is None
    assert set(checkpoint.shapes()) == {name.removeprefix("model.") for name in random_tensors()}


@pytest.mark.parametrize("part", ["weight.absmax", "weight.quant_map", "weight.nested_absmax"])
def test_an_nf4_matrix_without_a_part_is_told(part, tmp_path):
    folder, _ = nf4_folder(tmp_path, nested=True, damage=lambda tensors: tensors.pop(UP + part))
    with pytest.raises(RefusedError, match=rf"wants layers\.1\.mlp\.up_proj\.{part} to be .*, but it is missing"):
        SafetensorsCheckpoint(folder)
