"""AWQ, GPTQ and compressed-tensors folders: exact values, the same codes in the engine, and what cannot be is told."""

import fnmatch
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from slipstream.engine_impl.checkpoints.contract import Quantization
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.plan import abstract_engine, quantization_of, shape_of
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.quantization.swap import resolved
from slipstream.kernels.blockwise_matmul import unpack

from tests.arrays import array

from ..tiny_models import greedy
from . import packers
from .folders import CONFIG, random_tensors, write_folder

GROUP = 32
SIZES = CONFIG | {"hidden_size": 64, "intermediate_size": 96}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "lm_head": False}
PACKED_WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP, "actorder": None,
}  # fmt: skip
INT8_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(format, weights, activations=None, **more):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": groups,
        "ignore": ["lm_head"],
    } | more


FORMATS = {
    "awq": (AWQ, packers.awq),
    "gptq": (GPTQ | {"checkpoint_format": "gptq"}, packers.gptq),
    "gptq, old": (GPTQ, packers.gptq),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, packers.gptq_v2),
    "gptq_v2, new": (GPTQ | {"format": "gptq_v2"}, packers.gptq_v2),
    "packed": (compressed("pack-quantized", PACKED_WEIGHTS), packers.packed),
    "packed, symmetric": (
        compressed("pack-quantized", PACKED_WEIGHTS | {"symmetric": True}), packers.packed_symmetric,
    ),
    "int8": (compressed("int-quantized", INT8_WEIGHTS, DYNAMIC), packers.int8),
    "int8, naive": (compressed("naive-quantized", INT8_WEIGHTS), packers.int8),
}  # fmt: skip
INT8 = ("int8", "int8, naive")


class Quantized:
    """A random model: codes, the floats that they stand for (computed in float64), and the folder's tensors."""

    def __init__(self, kind, *, unconverted=(), group_order=None):
        """`group_order`: (module, inputs) -> the group of each input."""
        self.described, pack = FORMATS[kind]
        self.codes, self.floats, self.tensors = {}, random_tensors(SIZES, np.float16), {}
        rng = np.random.default_rng(7)
        for name, value in list(self.floats.items()):
            module = name.removesuffix(".weight")
            if not name.endswith("_proj.weight") or any(fnmatch.fnmatch(module, pattern) for pattern in unconverted):
                self.tensors[name] = value
                continue
            O, I = value.shape
            Q = 1 if kind in INT8 else I // GROUP
            group_I = np.arange(I) * Q // I if group_order is None else group_order(module, I)
            code_OI = rng.integers(-128, 128, (O, I)) if kind in INT8 else rng.integers(0, 16, (O, I))
            for group in range(Q):  # a group spans all codes, so that there is but one grid for it
                inputs = np.flatnonzero(group_I == group)
                code_OI[:, inputs[0]], code_OI[:, inputs[1]] = (-128, 127) if kind in INT8 else (0, 15)
            zero_OQ = np.full((O, Q), 0 if kind in INT8 else 8)
            if kind not in (*INT8, "packed, symmetric"):
                zero_OQ = rng.integers(5, 11, (O, Q))
                zero_OQ[:2, 0] = (1, 16) if kind in ("gptq", "gptq, old") else (0, 15)  # what can be stored
            scale_OQ = rng.uniform(0.5, 1.5, (O, Q)) / np.abs(code_OI - zero_OQ[:, group_I]).max() / I**0.5 * 12
            scale_OQ = scale_OQ.astype(np.float16)
            exact_OI = (code_OI - zero_OQ[:, group_I]) * scale_OQ.astype(np.float64)[:, group_I]
            self.codes[name.removeprefix("model.")], self.floats[name] = code_OI, exact_OI.astype(np.float32)
            assert (self.floats[name] == exact_OI).all()
            parts = pack(code_OI, zero_OQ, scale_OQ)
            if group_order is not None:
                parts["g_idx"] = group_I.astype(np.int32)
            self.tensors |= {f"{module}.{part}": array for part, array in parts.items()}

    def folder(self, path, tensors=None, **described):
        config = SIZES | {"quantization_config": self.described | described}
        return write_folder(path, tensors=self.tensors | (tensors or {}), config=config)


def load(folder, **options):
    config = EngineConfig(model=str(folder), cache_length=128, slots=2, max_prefill_length=16)
    return load_engine(replace(config, **({"tensor_parallel": 1} | options)))


def leaf(params, name):
    """A parameter of layer i, by its whole name."""
    _, layer, own = name.split(".", 2)
    return np.asarray(params["layers"][int(layer)][own])


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_exact(tmp_path, kind):
    model = Quantized(kind)
    checkpoint = SafetensorsCheckpoint(model.folder(tmp_path / "m"))
    assert checkpoint.shapes() == {name.removeprefix("model."): value.shape for name, value in model.floats.items()}
    for name, value in model.floats.items():
        tensor = checkpoint.tensor(name.removeprefix("model."))
        np.testing.assert_array_equal(tensor, value, err_msg=name, strict=False)
        assert tensor.dtype == (np.float32 if name.removeprefix("model.") in model.codes else np.float16)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in FORMATS), ("awq", {"tensor_parallel": 2}), ("awq", {"dtype": "bfloat16"})],
)
def test_codes_are_kept(tmp_path, kind, options):
    """Nobody said how to store the weights: they stay as they are, whatever the type of the scales."""
    model = Quantized(kind)
    _, params = load(model.folder(tmp_path / "m"), **options)
    for name, code_OI in model.codes.items():
        module = name.removesuffix(".weight")
        if kind in INT8:
            np.testing.assert_array_equal(leaf(params, f"{module}.code"), code_OI, err_msg=name)
        else:
            code_IO = np.asarray(unpack(array(leaf(params, f"{module}.packed"))))
            np.testing.assert_array_equal(code_IO.T, code_OI - 8, err_msg=name)
    assert params["lm_head"]["weight"].dtype == options.get("dtype", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["awq", "int8"])
def test_answers_are_those_of_the_decoded_weights(tmp_path, kind):
    model = Quantized(kind)
    quantized = load(model.folder(tmp_path / "quantized"))
    floats = load(write_folder(tmp_path / "floats", tensors=model.floats, config=SIZES))
    prompts = [[5, 77, 130, 9], [201]]
    answers = greedy(*quantized, prompts, 8)
    assert answers == greedy(*floats, prompts, 8)
    assert len(set(answers[0])) > 2


def test_none_takes_them_as_floats(tmp_path):
    model = Quantized("gptq")
    _, params = load(model.folder(tmp_path / "m"), quantize_weights="none")
    for name in model.codes:
        np.testing.assert_array_equal(leaf(params, name), model.floats[f"model.{name}"])


def shuffled(module, inputs):
    return np.random.default_rng(len(module)).permutation(np.arange(inputs) // GROUP)


def in_order(module, inputs):
    return np.arange(inputs) // GROUP


def test_groups_out_of_order_are_exact_as_floats_and_never_become_int4(tmp_path):
    model = Quantized("gptq", group_order=shuffled)
    folder = model.folder(tmp_path / "m", desc_act=True)
    checkpoint = SafetensorsCheckpoint(folder)
    for name in model.codes:
        np.testing.assert_array_equal(checkpoint.tensor(name), model.floats[f"model.{name}"])
    for options in ({}, {"quantize_weights": "int4"}, {"quantize_block": 32}):
        with pytest.raises(RefusedError, match=r"desc_act; give --quantize-weights none, .* or int8"):
            load(folder, **options)
    _, params = load(folder, quantize_weights="int8")
    assert leaf(params, "layers.0.mlp.up_proj.code").dtype == np.int8


def test_an_order_that_the_config_denies_is_told(tmp_path):
    model = Quantized("gptq", group_order=shuffled)
    with pytest.raises(RefusedError, match=r"groups lie in order, but layers\.0\.\S+\.g_idx has another"):
        load(model.folder(tmp_path / "m"))


def test_a_group_that_is_not_there_is_told(tmp_path):
    model = Quantized("gptq", group_order=shuffled)
    name = "model.layers.1.mlp.down_proj.g_idx"
    folder = model.folder(tmp_path / "m", tensors={name: model.tensors[name] + 1}, desc_act=True)
    with pytest.raises(RefusedError, match=r"has 3 groups, but layers\.1\.mlp\.down_proj\.g_idx names others"):
        load(folder, quantize_weights="none")


def test_a_plain_order_may_be_stored(tmp_path):
    model = Quantized("gptq", group_order=in_order)
    _, params = load(model.folder(tmp_path / "m"))
    code_IO = unpack(array(leaf(params, "layers.0.mlp.up_proj.packed")))
    np.testing.assert_array_equal(np.asarray(code_IO).T + 8, model.codes["layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("kind", "unconverted", "described"),
    [
        ("awq", ["*.down_proj", "*.k_proj"], {"modules_to_not_convert": ["down_proj", "self_attn.k_proj"]}),
        ("gptq", ["*.q_proj"], {"dynamic": {r"-:.*q_proj": {}}}),
        ("int8", ["*.down_proj", "*.up_proj"], {
            "ignore": ["lm_head", "re:.*down_proj", *(f"model.layers.{i}.mlp.up_proj" for i in range(2))]
        }),
    ],
)  # fmt: skip
def test_what_was_left_as_it_was_stays(tmp_path, kind, unconverted, described):
    """By the files' headers when they are loaded, by config.json when they are planned: alike."""
    model = Quantized(kind, unconverted=unconverted)
    folder = model.folder(tmp_path / "m", **described)
    _, params = load(folder)
    for layer in (0, 1):
        for name, value in params["layers"][layer].items():
            whole = f"model.layers.{layer}.{name}"
            if name.endswith("_proj.weight"):
                np.testing.assert_array_equal(value, model.floats[whole].astype(np.float32))
                assert any(fnmatch.fnmatch(whole.removesuffix(".weight"), pattern) for pattern in unconverted)
    planned = abstract_engine(
        shape_of(str(folder)), "v5e:2x2", CHIP, quantization_of(str(folder))
    ).parameters.abstract()
    names = {*planned["layers"], *itertools.chain(*planned["alike"])}
    assert names == set(params["layers"][0]) == set(params["layers"][1])


CHIP = EngineConfig(cache_length=128, tensor_parallel=1)


def test_layers_have_to_be_alike(tmp_path):
    """One program runs them all on a TPU: a module left as it was in one layer would be quantised in silence."""
    model = Quantized("awq", unconverted=["model.layers.1.mlp.down_proj"])
    folder = model.folder(tmp_path / "m")
    with pytest.raises(RefusedError, match=r"layers\.\*\.mlp\.down_proj was .* int4 in some layers .*-weights int4"):
        load(folder)
    _, params = load(folder, quantize_weights="int4")
    assert "mlp.down_proj.packed" in params["layers"][1]


@pytest.mark.parametrize(("kind", "stored"), [("awq", "up_proj.packed"), ("int8", "gate_and_up.code")])
def test_a_plan_is_of_what_would_be_loaded(tmp_path, kind, stored):
    folder = Quantized(kind).folder(tmp_path / "m")
    for path in (folder, folder / "config.json"):
        engine = abstract_engine(shape_of(str(path)), "v5e:2x2", CHIP, quantization_of(str(path)))
        assert f"mlp.{stored}" in engine.parameters.abstract()["layers"]
    assert quantization_of("llama-2-7b") is None
    assert quantization_of("embedded") is None
    assert quantization_of("some.gguf") is None


def test_a_bias_of_zeros_that_no_model_asked_for_is_left_alone(tmp_path):
    model, name = Quantized("gptq"), "model.layers.0.mlp.up_proj.bias"
    load(model.folder(tmp_path / "zeros", tensors={name: np.zeros(96, np.float16)}))
    with pytest.raises(RefusedError, match=r"unexpected: layers\.0\.mlp\.up_proj\.bias$"):
        load(model.folder(tmp_path / "others", tensors={name: np.ones(96, np.float16)}))


def block_of(stored, devices, model="llama-2-7b"):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    config = resolved(EngineConfig(), stored, registry.build(PRESETS[model]), mesh)
    assert config.quantize_weights == stored.weights
    return config.quantize_block


def test_blocks_are_the_largest_that_chips_can_share():
    """Llama 2 7B has 11008 = 86 * 128 inputs in down_proj."""
    stored = Quantization("int4", 128)
    assert [block_of(stored, devices) for devices in (1, 2, 4, 8)] == [128, 128, 64, 32]
    assert [block_of(Quantization("int4", group), 1) for group in (32, 64, 256, None)] == [32, 64, 128, 128]
    assert block_of(Quantization("int8"), 1) is None
    with pytest.raises(RefusedError, match=r"groups of 16; give --quantize-weights none"):
        block_of(Quantization("int4", 16), 1)


def test_what_the_user_says_counts_more():
    mesh, model = Mesh(np.array(jax.devices()[:1]), ("tensor",)), registry.build(PRESETS["llama-2-7b"])
    stored = Quantization("int4", 128, floats=(r".*\.o_proj",))

    def found(**options):
        config = resolved(EngineConfig(**options), stored, model, mesh)
        excluded.add(config.quantize_exclude)
        return config.quantize_weights, config.quantize_block

    excluded = set()
    assert found() == ("int4", 128)
    assert excluded == {("lm_head", "layers.*.self_attn.o_proj")}
    assert found(quantize_block=64) == ("int4", 64)
    assert found(quantize_weights="int4") == ("int4", 128)
    assert found(quantize_weights="int8") == ("int8", None)
    assert found(quantize_weights="none") == ("none", None)
    with pytest.raises(RefusedError, match="needs int8 weights"):
        found(quantize_activations="int8")
    of_floats = resolved(EngineConfig(), None, model, mesh)
    assert of_floats.quantize_weights == "none"


REFUSED = {
    "awq of 8 bits": (AWQ | {"bits": 8}, "asks for bits=8; those there are: 4"),
    "awq gemv": (AWQ | {"version": "gemv"}, "asks for version='gemv'"),
    "gptq of 3 bits": (GPTQ | {"bits": 3}, "asks for bits=3; those there are: 4, 8"),
    "gptq, marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    "gptq, some of 2 bits": (GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 2}}}, "asks for bits=2"),
    "gptq, a strange group": (GPTQ | {"group_size": 0}, "asks for group_size=0"),
    "another method": ({"quant_method": "hqq"}, "quantised by 'hqq'; .* awq, gptq, compressed-tensors, fp8"),
    "fp8 of another kind": ({"quant_method": "fp8", "fmt": "e5m2"}, "asks for fmt='e5m2'; those there are: e4m3"),
    "fp8, strange blocks": ({"quant_method": "fp8", "weight_block_size": [128]}, r"asks for blocks of \[128\]"),
    "bitsandbytes of 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit=True"),
    "bitsandbytes of fp4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "bnb_4bit_quant_type='fp4'; those there are: nf4",
    ),
    "nothing": ({"bits": 4}, "quantised by None"),
    "floats of 4 bits": (
        compressed("float-quantized", INT8_WEIGHTS | {"type": "float", "num_bits": 4}), "asks for num_bits=4",
    ),
    "floats by token": (
        compressed("float-quantized", INT8_WEIGHTS | {"type": "float", "strategy": "token"}), "strategy='token'",
    ),
    "another format": (compressed("marlin-24", INT8_WEIGHTS), "asks for format='marlin-24'"),
    "one scale": (compressed("int-quantized", INT8_WEIGHTS | {"strategy": "tensor"}), "asks for strategy='tensor'"),
    "int8, zeros": (compressed("int-quantized", INT8_WEIGHTS | {"symmetric": False}), "asks for symmetric=False"),
    "packed int8": (compressed("pack-quantized", PACKED_WEIGHTS | {"num_bits": 8}), "asks for num_bits=8"),
    "fixed activations": (compressed("int-quantized", INT8_WEIGHTS, DYNAMIC | {"dynamic": False}), "fixed scales"),
    "a quantised cache": (compressed("int-quantized", INT8_WEIGHTS, kv_cache_scheme=DYNAMIC), "kv_cache_scheme"),
    "sparse": (
        compressed("int-quantized", INT8_WEIGHTS, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config",
    ),
    "mixed, some of 4 bits that are not packed": (
        compressed("int-quantized", INT8_WEIGHTS, config_groups={
            "a": {"targets": ["Linear"], "weights": INT8_WEIGHTS},
            "b": {"targets": ["re:.*up_proj"], "weights": INT8_WEIGHTS | {"num_bits": 4}},
        }),
        "asks for num_bits=4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, case):
    described, message = REFUSED[case]
    folder = write_folder(tmp_path / "m", config=CONFIG | {"quantization_config": described})
    with pytest.raises(RefusedError, match=rf"config\.json' .*{message}.*not quantised, and give --quantize-weights"):
        SafetensorsCheckpoint(folder)
    with pytest.raises(RefusedError, match=message):
        quantization_of(str(folder))


UP = "model.layers.1.mlp.up_proj"
DAMAGES = {
    "no zeros": (lambda t: t.pop(f"{UP}.qzeros"), r"wants layers\.1\.mlp\.up_proj\.qzeros to be .*but it is missing"),
    "no codes": (lambda t: t.pop(f"{UP}.qweight"), r"up_proj\.qzeros in I32; .*no quantization_config that says"),
    "another group": (
        lambda t: t.update({f"{UP}.scales": np.ones((1, 96), np.float16)}), r"scales to be \(2, 96\), but it is \(1, 9",
    ),
    "infinite": (
        lambda t: t.update({f"{UP}.scales": np.full((2, 96), np.inf, np.float16)}),
        r"NaN or infinite as float32: layers\.1\.mlp\.up_proj\.weight",
    ),
    "another shape": (
        lambda t: t.update({f"{UP}.{part}": t[f"model.layers.1.mlp.down_proj.{part}"] for part in packers.awq(
            np.zeros((8, 8), int), np.zeros((8, 1), int), np.zeros((8, 1)))}),
        r"up_proj\.weight is \(64, 96\), the model needs \(96, 64\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_modules_are_told(tmp_path, damage):
    model = Quantized("awq")
    change, message = DAMAGES[damage]
    change(model.tensors)
    with pytest.raises(RefusedError, match=message):
        load(model.folder(tmp_path / "m"))


def test_codes_that_no_config_describes_are_told(tmp_path):
    with pytest.raises(RefusedError, match=r"in I32; its config\.json has no quantization_config"):
        load(write_folder(tmp_path / "m", tensors=Quantized("awq").tensors, config=SIZES))
