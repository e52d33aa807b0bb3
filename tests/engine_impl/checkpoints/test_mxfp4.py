"""gpt-oss' experts as they are published, against transformers' own decoding, and by hand."""

import logging

import numpy as np
import pytest
import torch
from slipstream.engine_impl.checkpoints.mxfp4 import COMPACT
from slipstream.engine_impl.checkpoints.prequantized import Matrix
from slipstream.engine_impl.checkpoints.quantization_config import read_format
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine
from slipstream.kernels import pack_blocks, unpack

from .folders import CONFIG, write_folder

E, D, F = 2, 64, 32
CODED = CONFIG | {
    "model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": D, "intermediate_size": F, "head_dim": 16,
    "num_local_experts": E, "num_experts_per_tok": 1, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
EXPERTS = "model.layers.0.mlp.experts."


def tensors(damage=lambda tensors: None):
    """A layer, its experts in codes, by the names that a published folder has."""
    rng = np.random.default_rng(0)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def coded(name, outputs, inputs):
        return {
            f"{EXPERTS}{name}_blocks": rng.integers(0, 256, (E, outputs, inputs // 32, 16), np.uint8),
            f"{EXPERTS}{name}_scales": rng.integers(110, 130, (E, outputs, inputs // 32), np.uint8),
            f"{EXPERTS}{name}_bias": floats(E, outputs),
        }

    layer, attention = "model.layers.0.", {"q": (64, D), "k": (32, D), "v": (32, D), "o": (D, 64)}
    made = {
        "model.embed_tokens.weight": floats(259, D), "lm_head.weight": floats(259, D), "model.norm.weight": floats(D),
        f"{layer}input_layernorm.weight": floats(D), f"{layer}post_attention_layernorm.weight": floats(D),
        f"{layer}self_attn.sinks": floats(4), f"{layer}mlp.router.weight": floats(E, D),
        f"{layer}mlp.router.bias": floats(E), **coded("gate_up_proj", 2 * F, D), **coded("down_proj", D, F),
    }  # fmt: skip
    for name, shape in attention.items():
        made[f"{layer}self_attn.{name}_proj.weight"] = floats(*shape)
        made[f"{layer}self_attn.{name}_proj.bias"] = floats(shape[0])
    damage(made)
    return made


def test_experts_are_transformers_own(tmp_path, caplog):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = tensors()
    with caplog.at_level(logging.INFO):
        checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, tensors=stored, config=CODED))
    assert f"{3 * E} matrices of MXFP4, which are widened to floats, but by native kernels of CPUs" in caplog.text
    assert checkpoint.quantization is None
    for name, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        codes = (torch.from_numpy(stored[f"{EXPERTS}{name}_{kind}"]) for kind in ("blocks", "scales"))
        expected_EIO = convert_moe_packed_tensors(*codes, dtype=torch.float32).numpy()
        for e in range(E):
            for at, part in enumerate(parts):
                module = f"layers.0.mlp.experts.{e}.{part}"
                tensor = checkpoint.tensor(f"{module}.weight")
                assert tensor.dtype.name == "bfloat16"
                expected_OI = expected_EIO[e][:, at :: len(parts)].T
                np.testing.assert_array_equal(tensor.astype(np.float32), expected_OI)
                of_codes = pack_blocks(*checkpoint.codes(f"{module}.weight"), bits=4, table=COMPACT.table)
                np.testing.assert_array_equal(unpack(of_codes, *expected_OI.shape), expected_OI)
                bias = stored[f"{EXPERTS}{name}_bias"][e, at :: len(parts)]
                np.testing.assert_array_equal(checkpoint.tensor(f"{module}.bias"), bias)
    config = EngineConfig(
        model=str(tmp_path), cache_length=128, slots=1, max_prefill_length=16, tensor_parallel=1, dtype="bfloat16"
    )
    _, params = load_engine(config)
    loaded = np.asarray(params["layers"][0]["mlp.w2.weight"][1].astype(np.float32))
    np.testing.assert_array_equal(loaded, checkpoint.tensor("layers.0.mlp.experts.1.down_proj.weight").T)


def test_by_hand():
    """The lower half of a byte first; 1 in a scale's lowest bit is a factor of two."""
    described = read_format({"quantization_config": {"quant_method": "mxfp4"}}, "config.json")
    assert described is not None
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, :3] = 0x51, 0xA7, 0x08  # 0.5, 3; 6, -1; -0, 0
    arrays = {"blocks": blocks, "scales": np.array([[126]], np.uint8)}
    weight = described.floats(Matrix((1, 32), {}), arrays).astype(np.float32)
    assert weight[0, :7].tolist() == [0.25, 1.5, 3.0, -0.5, 0.0, 0.0, 0.0]


GATE, DOWN = "gate_up_proj", "down_proj"
DAMAGES = {
    "no scales": (
        lambda t: t.pop(f"{EXPERTS}{DOWN}_scales"),
        r"wants layers\.0\.mlp\.experts\.0\.down_proj\.scales to be \(64, 1\), but it is missing",
    ),
    "other scales": (
        lambda t: t.update({f"{EXPERTS}{GATE}_scales": np.zeros((E, 2 * F, 1), np.uint8)}),
        r"gate_proj\.scales to be \(32, 2\), but it is \(32, 1\)",
    ),
    "other blocks": (
        lambda t: t.update({f"{EXPERTS}{DOWN}_blocks": np.zeros((E, D, 2, 8), np.uint8)}),
        r"down_proj\.blocks to be \[outputs, blocks, 16\], but it is \(64, 2, 8\)",
    ),
    "floats": (
        lambda t: t.update({f"{EXPERTS}{DOWN}_scales": np.zeros((E, D, 1), np.float32)}),
        r"down_proj\.scales to be uint8, but it is float32",
    ),
    "NaN": (
        lambda t: t[f"{EXPERTS}{DOWN}_scales"].__setitem__((0, 0, 0), 255),
        r"NaN or infinite as float32: layers\.0\.mlp\.w2\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_codes_are_told(damage, tmp_path):
    change, message = DAMAGES[damage]
    folder = write_folder(tmp_path, tensors=tensors(change), config=CODED)
    with pytest.raises(RefusedError, match=message):
        load_engine(EngineConfig(model=str(folder), cache_length=128, slots=1, tensor_parallel=1))
