"""Quantised weights: the codecs, the products, the pass over the model, and what engines make of them."""

import fnmatch
import functools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from slipstream.engine_impl import assembly, loading
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.quantization import int8_matmul
from slipstream.engine_impl.quantization.codecs import encode_int4, encode_int8
from slipstream.engine_impl.quantization.int8_matmul import multiply_floats, multiply_rounded, multiply_split
from slipstream.engine_impl.quantization.linear import Int4Linear, Int8Linear
from slipstream.kernels.blockwise_matmul import unpack

from tests.arrays import array

from ..tiny_models import TINY, RandomCheckpoint, greedy

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 101,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
GPT_OSS = MIXTRAL | {"model_type": "gpt_oss", "sliding_window": 8}
PROMPTS = [[5, 17, 3], [90, 2, 41, 8, 60, 77, 13]]
SHAPE = replace(TINY, model_dim=64, ffn_dim=96, num_layers=2)  # blocks of 32
OF_8_BLOCKS = replace(SHAPE, ffn_dim=256)  # eight devices share them


def decoded(packed) -> np.ndarray:
    """Float64 [O, I] of int4 arrays."""
    code_IO, scale_QO, offset_QO = (np.asarray(x, np.float64) for x in (unpack(packed[0]), *packed[1:]))
    block = len(code_IO) // len(scale_QO)
    return (code_IO * scale_QO.repeat(block, axis=0) + offset_QO.repeat(block, axis=0)).T


def awkward(rng, O, I):
    """Rows of all sizes, an outlier channel, zeros, a constant row."""
    weight_OI = rng.normal(size=(O, I)) * np.exp(rng.normal(size=(O, 1)) * 3)
    weight_OI[:, 3] *= 100
    weight_OI[1], weight_OI[2] = 0, -0.7
    return weight_OI.astype(np.float32)


def test_int8_is_off_by_half_a_step_at_most():
    weight_OI = awkward(np.random.default_rng(0), 40, 96)
    code_OI, scale_O = (np.asarray(x, np.float64) for x in encode_int8(array(weight_OI)).values())
    assert 127 <= np.abs(code_OI).max() <= 128
    assert (np.abs(code_OI * scale_O[:, None] - weight_OI) <= scale_O[:, None] * 0.5001).all()
    assert np.array_equal(code_OI[1], np.zeros(96))


@pytest.mark.parametrize("extreme", [127, -127, -128])
def test_int8_codes_of_another_tool_are_kept(extreme):
    rng = np.random.default_rng(1)
    code_OI = rng.integers(-126, 127, (8, 64))
    code_OI[:, 5] = extreme
    weight_OI = code_OI * rng.uniform(1e-4, 1e-2, (8, 1))
    assert np.array_equal(encode_int8(array(weight_OI, jnp.float32))["code"], code_OI)


def test_int8_rows_of_another_tool_need_not_reach_127():
    """Row 0 does; the others are then looked at more closely. Nor does a row of zeros disturb."""
    rng = np.random.default_rng(1)
    largest = np.array([127, -128, 126, -100, 65, 33, 1, 0], np.int64)[:, None]
    size = np.abs(largest)
    code_OI = rng.integers(1 - size, np.maximum(size, 2 - size), (8, 64))
    code_OI[:, 5], code_OI[-1] = largest[:, 0], 0
    scale_O1 = rng.uniform(1e-4, 1e-2, (8, 1)).astype(np.float16).astype(np.float64)
    encoded = encode_int8(array(code_OI * scale_O1, jnp.float32))
    assert np.array_equal(encoded["code"][:5], code_OI[:5])
    np.testing.assert_allclose(encoded["code"] * encoded["scale"][:, None], code_OI * scale_O1, rtol=1e-6)


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (1, "float32"),
        (32, "float32"),
        (32, "bfloat16"),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(64, "float32", marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_int4_is_off_by_half_a_step_but_beyond_the_ends_of_a_grid(block, dtype):
    weight_OI = awkward(np.random.default_rng(2), 24, 128)
    packed = encode_int4(array(weight_OI), block, jnp.dtype(dtype))
    code_OI, scale_OI = (
        np.asarray(unpack(packed.packed)).T,
        np.asarray(packed.scale, np.float64).T.repeat(block, axis=1),
    )
    off_OI = decoded(packed) - weight_OI
    slack_OI = scale_OI * 0.5001 + 1e-6 * np.abs(weight_OI)
    assert np.isfinite(off_OI).all()
    assert (off_OI <= slack_OI)[code_OI != -8].all(), "only what lies below the grid's least value comes out higher"
    assert (-off_OI <= slack_OI)[code_OI != 7].all()


def spanning(weight_OI, block) -> np.ndarray:
    """By hand: each block's least value is its first step, its largest the 15th."""
    weight_Xi = weight_OI.astype(np.float64).reshape(-1, block)
    least_X1, largest_X1 = weight_Xi.min(1, keepdims=True), weight_Xi.max(1, keepdims=True)
    scale_X1 = np.where(largest_X1 > least_X1, (largest_X1 - least_X1) / 15, 1)
    return (np.round((weight_Xi - least_X1) / scale_X1) * scale_X1 + least_X1).reshape(weight_OI.shape)


@pytest.mark.parametrize("block", [32, 128, pytest.param(64, marks=pytest.mark.slow)])
def test_int4_is_nearer_than_a_grid_that_spans_the_block(block):
    """In no block farther, by the weights of the fit; on normal weights by a twentieth of the squared error or more."""
    weight_OI = awkward(np.random.default_rng(7), 24, 128)

    def error_X(decoded_OI):
        square_Xi = ((decoded_OI - weight_OI) ** 2).reshape(-1, block)
        weight_Xi = np.abs(weight_OI.astype(np.float64)).reshape(-1, block)
        return ((weight_Xi + np.sqrt((weight_Xi**2).mean(1, keepdims=True))) * square_Xi).sum(1)

    fitted_OI = decoded(encode_int4(array(weight_OI), block, jnp.dtype("float32")))
    allowed_X = error_X(spanning(weight_OI, block))
    assert (error_X(fitted_OI) <= allowed_X * 1.001 + 1e-9 * allowed_X.max()).all()
    normal_OI = np.random.default_rng(8).normal(size=(64, 256)).astype(np.float32)
    fitted_OI = decoded(encode_int4(array(normal_OI), block, jnp.dtype("float32")))
    square = ((fitted_OI - normal_OI) ** 2).sum() / ((spanning(normal_OI, block) - normal_OI) ** 2).sum()
    assert square < 0.95


@pytest.mark.parametrize(("low", "high"), [(0, 16), (3, 9), (-8, 8)])
def test_int4_grids_of_other_tools_are_kept(low, high):
    """Q4_0, Q4_1, AWQ and GPTQ weights lie on a grid; a block of them need not span 15 steps."""
    rng = np.random.default_rng(3)
    step_OQi = rng.integers(low, high, (16, 8, 32))
    step_OQi[0, 0] = rng.integers(0, 16, 32)
    step_OQi[0, 0, :2] = 0, 15
    scale_OQ1, offset_OQ1 = rng.uniform(1e-3, 1e-2, (16, 8, 1)), rng.normal(size=(16, 8, 1))
    weight_OI = (step_OQi * scale_OQ1 + offset_OQ1 * (low == 0)).reshape(16, 256).astype(np.float32)
    packed = encode_int4(array(weight_OI), 32, jnp.dtype("float32"))
    np.testing.assert_allclose(decoded(packed), weight_OI, rtol=0, atol=1e-6)


def test_int4_scales_in_bfloat16_cost_little():
    weight_OI = np.random.default_rng(4).normal(size=(24, 128)).astype(np.float32)  # a shape compiled above
    error = {}
    for dtype in ("float32", "bfloat16"):
        error[dtype] = np.abs(decoded(encode_int4(array(weight_OI), 32, jnp.dtype(dtype))) - weight_OI).mean()
    assert error["bfloat16"] < 1.1 * error["float32"]


@pytest.mark.parametrize(
    ("multiply", "tolerance"), [(multiply_floats, 1e-6), (multiply_split, 2**-16), (multiply_rounded, 2**-7)]
)
@pytest.mark.parametrize("R", [1, 5])
def test_int8_products_against_float64(multiply, tolerance, R):
    rng = np.random.default_rng(5)
    x_RI = rng.normal(size=(R, 96)).astype(np.float32)
    x_RI[:, 7] *= 30
    x_RI[-1] = 0
    code_OI, scale_O = rng.integers(-128, 128, (40, 96), dtype=np.int8), rng.uniform(0.1, 2, 40).astype(np.float32)
    exact_RO = x_RI.astype(np.float64) @ (code_OI * scale_O[:, None].astype(np.float64)).T
    out_RO = multiply(*map(jnp.asarray, (x_RI, code_OI, scale_O)))
    bound = tolerance * np.abs(x_RI).max(1, keepdims=True) * 128 * scale_O * math.sqrt(96)
    assert (np.abs(out_RO - exact_RO) <= bound).all()


@pytest.mark.parametrize("split", ["inputs", "outputs", None])
def test_int8_products_of_eight_devices(split):
    rng = np.random.default_rng(6)
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    x_RI, scale_O = rng.normal(size=(3, 64)).astype(np.float32), rng.uniform(0.1, 2, 16).astype(np.float32)
    code_OI = rng.integers(-128, 128, (16, 64), dtype=np.int8)
    out_RO = jax.jit(int8_matmul.shared(multiply_split, split, mesh))(x_RI, code_OI, scale_O)
    np.testing.assert_allclose(out_RO, x_RI @ (code_OI * scale_O[:, None]).T, atol=0.5, rtol=1e-4)


@dataclass(frozen=True)
class Decoded(RandomCheckpoint):
    """What a quantised engine's weights stand for, as floats."""

    kind: str = "int8"

    def tensor(self, name: str) -> np.ndarray:
        value = super().tensor(name)
        if not fnmatch.fnmatch(name, "layers.*_proj.weight"):
            return value
        if self.kind == "int4":
            return decoded(encode_int4(array(value), 32, jnp.dtype("float32"))).astype(np.float32)
        code_OI, scale_O = encode_int8(array(value)).values()
        return np.asarray(code_OI * scale_O[:, None])


def engine_with(checkpoint, *, devices=1, **options):
    config = EngineConfig(slots=4, cache_length=128, max_prefill_length=16, tensor_parallel=devices, **options)
    engine = loading.build_engine(config, checkpoint)
    return engine, engine.parameters.load(checkpoint)


@functools.cache
def answers_of_decoded_weights(kind):
    """What any engine with weights of this kind has to say."""
    return greedy(*engine_with(Decoded(OF_8_BLOCKS, kind=kind)), PROMPTS, 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("devices", "loop"), [(1, "unrolled"), pytest.param(1, "scan", marks=pytest.mark.product), (8, "scan")]
)
def test_an_engine_equals_one_with_the_decoded_weights(kind, devices, loop, monkeypatch):
    reference = answers_of_decoded_weights(kind)
    monkeypatch.setattr(assembly, "layer_loop_for", lambda platform, *models: loop)
    engine = engine_with(RandomCheckpoint(OF_8_BLOCKS), devices=devices, quantize_weights=kind)
    assert greedy(*engine, PROMPTS, 12) == reference


@pytest.mark.slow
@pytest.mark.parametrize(("config", "devices"), [(MIXTRAL, 1), (GPT_OSS, 4)], ids=["mixtral-1", "gpt_oss-4"])
def test_experts_become_int8(config, devices):
    """Many rows and a step of one: each way through the experts, with biases and without."""
    shape = registry.read_config(config, "config.json")

    @dataclass(frozen=True)
    class DecodedExperts(RandomCheckpoint):
        def tensor(self, name):
            value = super().tensor(name)
            if not fnmatch.fnmatch(name, "*.experts.*.weight") and not fnmatch.fnmatch(name, "*_proj.weight"):
                return value
            code_OI, scale_O = encode_int8(array(value)).values()
            return np.asarray(code_OI * scale_O[:, None])

    excluded = {"quantize_exclude": ("lm_head", "*.gate")}
    prompts = [list(range(3, 16)), [7]]
    reference = greedy(*engine_with(DecodedExperts(shape)), prompts, 6)
    quantized = engine_with(RandomCheckpoint(shape), devices=devices, quantize_weights="int8", **excluded)
    assert greedy(*quantized, prompts, 6) == reference


def test_what_is_excluded_stays(without_native_kernels):
    engine, params = engine_with(
        RandomCheckpoint(SHAPE), quantize_weights="int8", quantize_exclude=("layers.*.mlp.*", "*.o_proj")
    )
    linear = {name: type(module) for name, module in engine.model.named_modules() if name.endswith(("_proj", "head"))}
    quantized = {name.removeprefix("layers.1.") for name, kind in linear.items() if kind is Int8Linear}
    quantized = {name for name in quantized if not name.startswith("layers.0.")}
    assert quantized == {"lm_head", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert params["layers"][0]["mlp.up_proj.weight"].dtype == jnp.float32
    assert params["layers"][0]["self_attn.q_proj.code"].dtype == jnp.int8


def test_resident_bytes_are_those_of_the_codes():
    shape = replace(SHAPE, model_dim=256, ffn_dim=512)
    count = 2 * (256 * (128 + 64 + 64) + 128 * 256 + 3 * 256 * 512)
    for kind, bits in (("int8", 8 + 32 / 128), ("int4", 4 + 2 * 32 / 32)):
        _, params = engine_with(RandomCheckpoint(shape), quantize_weights=kind)
        leaves = params["stacks"].values()
        assert all("norm" in name for layer in params["layers"] for name in layer)
        assert sum(x.nbytes for x in leaves) <= 1.03 * count * bits / 8


def test_what_cannot_be_is_refused():
    with pytest.raises(RefusedError, match=r"quantize_block=48 must be 32, 64 or 128"):
        EngineConfig(quantize_block=48)
    with pytest.raises(RefusedError, match=r"needs int8 weights"):
        EngineConfig(quantize_activations="int8", quantize_weights="int4")
    with pytest.raises(RefusedError, match=r"quantize_exclude='layers.9.*' matches no module; there are: layers.0."):
        engine_with(RandomCheckpoint(SHAPE), quantize_weights="int8", quantize_exclude=("layers.9.*",))
    with pytest.raises(RefusedError, match=r"have to be alike: say 'layers.\*.mlp.down_proj'"):
        engine_with(RandomCheckpoint(SHAPE), quantize_weights="int8", quantize_exclude=("layers.0.mlp.*",))
    with pytest.raises(RefusedError, match=r"does not divide a matrix of 96 inputs"):
        engine_with(RandomCheckpoint(SHAPE), quantize_weights="int4", quantize_block=64)


def test_int4_reads_the_stack_where_layers_are_scanned():
    assert Int4Linear.reads_stack
    assert not Int8Linear.reads_stack
