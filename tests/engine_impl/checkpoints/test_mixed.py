"""GPTQ of 8 bits, and folders of which some modules are quantised otherwise than the rest: exact, and told."""

import logging
from functools import partial

import ml_dtypes
import numpy as np
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.plan import quantization_of
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.loading import load_engine

from . import packers
from .folders import random_tensors, write_folder
from .test_prequantized import GPTQ, INT8_WEIGHTS, PACKED_WEIGHTS, SIZES

GROUP = 32
GPTQ8 = partial(packers.gptq, bits=8)


def grouped(shape, group, codes, zero, pack):
    """(a module's tensors, what they stand for in float64): random codes below `codes`; `zero`: of each group."""
    rng, (O, I) = np.random.default_rng(shape[0]), shape
    code_OI, scale_OQ = rng.integers(0, codes, shape), rng.uniform(0.01, 0.02, (O, I // group)).astype(np.float16)
    zero_OQ = rng.integers(1, codes, scale_OQ.shape) if zero is None else np.full(scale_OQ.shape, zero)
    group_I = np.arange(I) // group
    exact_OI = (code_OI - zero_OQ[:, group_I]) * scale_OQ.astype(np.float64)[:, group_I]
    return pack(code_OI, zero_OQ, scale_OQ), exact_OI


def float8(shape):
    rng = np.random.default_rng(shape[1])
    code_OI = (rng.normal(size=shape) * 8).astype(ml_dtypes.float8_e4m3fn)
    scale_O1 = rng.uniform(0.01, 0.02, (shape[0], 1)).astype(np.float32)
    return {"weight": code_OI, "weight_scale": scale_O1}, code_OI.astype(np.float64) * scale_O1


def folder_of(path, described, make):
    """(the folder, {parameter: exact values}); `make`: (module's own name, shape) -> as of `grouped`, or None."""
    tensors, exact = random_tensors(SIZES, np.float16), {}
    for name, value in list(tensors.items()):
        module = name.removesuffix(".weight")
        made = make(module.rpartition(".")[2], value.shape) if module.endswith("_proj") else None
        if made is not None:
            del tensors[name]
            tensors |= {f"{module}.{part}": array for part, array in made[0].items()}
            exact[name.removeprefix("model.")] = made[1]
    return write_folder(path, tensors=tensors, config=SIZES | {"quantization_config": described}), exact


def check(folder, exact, count, kind, caplog):
    """Every value is the one computed, they count as floats, and the log tells it."""
    with caplog.at_level(logging.INFO):
        checkpoint = SafetensorsCheckpoint(folder)
    assert f"{count} matrices of {kind}, which are widened to floats" in caplog.text
    assert checkpoint.quantization is None
    assert quantization_of(str(folder)) is None
    assert len(exact) == count
    for name, values in exact.items():
        np.testing.assert_allclose(checkpoint.tensor(name), values, rtol=1e-6, err_msg=name)


def test_gptq_of_8_bits_in_groups(tmp_path, caplog):
    folder, exact = folder_of(tmp_path, GPTQ | {"bits": 8}, lambda _, shape: grouped(shape, GROUP, 256, None, GPTQ8))
    check(folder, exact, 14, "int8 in groups", caplog)


def test_gptq_of_8_bits_out_of_order(tmp_path, caplog):
    """desc_act: each input says its group."""

    def make(_, shape):
        parts, exact_OI = grouped(shape, GROUP, 256, None, GPTQ8)
        order_I = np.random.default_rng(1).permutation(shape[1])
        code_IO = np.stack([parts["qweight"].view(np.uint8).reshape(-1, shape[0], 4)[..., at] for at in range(4)], 1)
        code_OI = code_IO.reshape(shape[1], shape[0]).T[:, order_I]
        parts["qweight"] = packers.along_columns(code_OI.T, bits=8)
        parts["g_idx"] = (np.arange(shape[1]) // GROUP)[order_I].astype(np.int32)
        return parts, exact_OI[:, order_I]

    check(*folder_of(tmp_path, GPTQ | {"bits": 8, "desc_act": True}, make), 14, "int8 in groups", caplog)


def test_gptq_of_8_bits_by_output_keeps_its_codes(tmp_path):
    """Symmetric, with a scale for each output: that is what the engine has, desc_act or not."""

    def make(_, shape):
        parts, exact_OI = grouped(shape, shape[1], 256, 128, GPTQ8)
        return parts | {"g_idx": np.zeros(shape[1], np.int32)}, exact_OI

    described = GPTQ | {"bits": 8, "group_size": -1, "sym": True, "desc_act": True}
    folder, exact = folder_of(tmp_path, described, make)
    config = EngineConfig(model=str(folder), cache_length=128, slots=2, max_prefill_length=16, tensor_parallel=1)
    _, params = load_engine(config)
    for name, values in exact.items():
        _, layer, own = name.split(".", 2)
        code, scale = (params["layers"][int(layer)][own.replace("weight", part)] for part in ("code", "scale"))
        np.testing.assert_allclose(np.asarray(code, np.float64) * np.asarray(scale)[:, None], values, rtol=1e-6)


def test_gptq_with_rules_for_some_modules(tmp_path, caplog):
    """The first rule that matches counts; `-:` leaves a module as it is."""
    rules = {"+:.*up_proj": {"bits": 8, "group_size": 16}, "-:.*down_proj": {}, ".*(up|gate)_proj": {"group_size": 16}}

    def make(module, shape):
        if module == "down_proj":
            return None
        if module == "up_proj":
            return grouped(shape, 16, 256, None, GPTQ8)
        return grouped(shape, 16 if module == "gate_proj" else GROUP, 16, 8, packers.gptq)

    check(*folder_of(tmp_path, GPTQ | {"dynamic": rules}, make), 12, "several kinds", caplog)


def test_compressed_tensors_in_groups_of_modules(tmp_path, caplog):
    """fp8 where a pattern says so, which alone has codes that memory may hold; 4 bits elsewhere, and one module by its
    name as int8."""
    by_channel = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    described = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head"], "config_groups": {
            "rest": {
                "targets": ["Linear"], "format": "pack-quantized", "weights": PACKED_WEIGHTS | {"symmetric": True},
            },
            "attention": {"targets": ["re:.*self_attn.*"], "format": "float-quantized", "weights": by_channel},
            "one": {
                "targets": [f"model.layers.{i}.mlp.down_proj" for i in range(2)], "format": "int-quantized",
                "weights": INT8_WEIGHTS,
            },
        },
    }  # fmt: skip

    def make(module, shape):
        if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return float8(shape)
        if module == "down_proj":
            parts, exact_OI = grouped(shape, shape[1], 256, 128, lambda code, _, scale: {"code": code, "scale": scale})
            return {"weight": (parts["code"] - 128).astype(np.int8), "weight_scale": parts["scale"]}, exact_OI
        return grouped(shape, GROUP, 16, 8, packers.packed_symmetric)

    folder, exact = folder_of(tmp_path, described, make)
    check(folder, exact, 14, "several kinds", caplog)
    checkpoint = SafetensorsCheckpoint(folder)
    kept = {name: form for name, form in checkpoint.compact().items() if name in exact}
    assert set(kept) == {name for name in exact if "self_attn" in name}
    for name, form in kept.items():
        code_OI, scale_O1, offset = checkpoint.codes(name)
        assert (form.kind, form.block, offset) == ("float8", code_OI.shape[1], None)
        np.testing.assert_allclose(code_OI.astype(np.float32) * scale_O1, exact[name], rtol=1e-6, err_msg=name)
